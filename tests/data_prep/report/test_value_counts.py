"""Counts of numbers compared with numpy, and the bins and charts of their histograms."""

import math
from itertools import pairwise

import duckdb
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.report.sheet_charts import digits_for, histogram_chart, measure_block, short_number
from data_prep.report.value_counts import Measure, count_values, histogram_edges
from tests.support.toy_sheets import assert_counts

numbers = st.one_of(
    st.lists(st.integers(-50, 5000), min_size=1, max_size=60),
    st.lists(st.integers(1, 2**40), min_size=1, max_size=60),
    st.lists(st.floats(-1e99, 1e99), min_size=1, max_size=60),
    st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=60),
)


@settings(max_examples=40)
@given(numbers)
def test_numbers_of_any_kind_are_counted_as_numpy_does(values):
    with duckdb.connect() as connection:
        connection.register("numbers", pyarrow.table({"x": [*values, None]}))
        assert_counts(count_values(connection, Measure("x", "x", view="numbers")), values)


def test_what_is_no_number_is_left_out():
    with duckdb.connect() as connection:
        values = [1.0, float("nan"), float("inf"), -float("inf"), None, 1e300]
        connection.register("numbers", pyarrow.table({"x": values}))
        counts = count_values(connection, Measure("x", "x", view="numbers"))
        assert counts.most_frequent == [(1.0, 1)]
        connection.register("nothing", pyarrow.table({"x": pyarrow.array([None], "double")}))
        assert count_values(connection, Measure("x", "x", view="nothing")).num_distinct == 0


@given(
    st.one_of(
        st.tuples(*[st.integers(-(2**62), 2**62)] * 3),
        st.tuples(*[st.integers(0, 300)] * 3),
        st.tuples(*[st.floats(-1e99, 1e99)] * 3),
        st.tuples(*[st.floats(1e-300, 1e99)] * 3),
    ).filter(lambda values: min(values) < max(values))
)
def test_bins_are_few_and_hold_every_value(values):
    minimum, median, maximum = sorted(values)
    is_whole = isinstance(minimum, int)
    edges, is_logarithmic = histogram_edges(minimum, median, maximum, is_whole=is_whole)
    assert edges[0] <= minimum and maximum < edges[-1]
    assert all(low < high for low, high in pairwise(edges))
    assert 2 <= len(edges) <= 40
    assert not is_logarithmic or edges[0] > 0
    assert not is_whole or all(isinstance(edge, int) for edge in edges)


def test_bins_have_round_edges():
    assert histogram_edges(1, 9, 21, is_whole=True) == (list(range(1, 23)), False)
    assert histogram_edges(0.1, 0.5, 0.9, is_whole=False)[0][:3] == [0.1, 0.15, 0.2]
    assert histogram_edges(0.1, 0.5, 0.6, is_whole=False)[0][-2:] == [0.6, 0.62]
    edges, is_logarithmic = histogram_edges(5, 50, 890, is_whole=True)
    assert is_logarithmic
    assert edges == [5, 6, 7, *(2**power * part for power in range(1, 8) for part in (4, 5, 6, 7))]


@pytest.mark.parametrize("start", [0.0, 5e-324, 1.0, 1e-3, -1.0, 1e16, 123456.789, 1e99])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 40])
def test_edges_of_neighbouring_numbers_do_not_repeat(start, num_steps):
    values = [start]
    for _ in range(num_steps):
        values.append(math.nextafter(values[-1], math.inf))
    edges, _ = histogram_edges(start, values[num_steps // 2], values[-1], is_whole=False)
    assert edges[0] <= start and values[-1] < edges[-1]
    assert all(low < high for low, high in pairwise(edges))


def test_labels_of_an_axis_do_not_repeat():
    for ticks in ([1e6, 1e6 + 1, 1e6 + 2], [0.1, 0.1 + 1e-9], [1, 2, 3], [999_990, 999_999, 1e6]):
        digits = digits_for(ticks)
        assert len({short_number(tick, digits) for tick in ticks}) == len(ticks)
    assert digits_for([0, 500, 1000]) == 4
    assert [short_number(value) for value in (999.99, 999_999, 1e9 - 1, 1500)] == [
        *("1k", "1M", "1G", "1.5k")
    ]


@pytest.mark.parametrize("values", [[1e-300, 1.0, 1e99], [-1e99, 0.5, 1e99], [2**62 - 40, 2**62]])
def test_a_chart_can_be_drawn_of_any_range(values):
    spread = np.linspace(values[0], values[-1], 20).tolist()
    spread = [int(value) for value in spread] if isinstance(values[0], int) else spread
    with duckdb.connect() as connection:
        connection.register("numbers", pyarrow.table({"x": [*values, *spread]}))
        counts = count_values(connection, Measure("x", "x", view="numbers"))
    if counts.spread.histogram:
        assert "<svg" in histogram_chart(counts.spread.histogram, Measure("x", "x"))
    assert (
        "median" in measure_block(Measure("x", "x"), counts, whole=30) or counts.num_distinct < 13
    )
