"""Conditions on NaN, types of scores over several files, and time zones, against plain Python."""

import math
import time
from datetime import UTC, datetime

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.config import MakeSubset, TopFraction
from data_prep.errors import InputError
from data_prep.make_subset import choose_samples
from data_prep.selection.condition import checked_condition
from data_prep.selection.missing_values import holds_floats, without_nan
from data_prep.selection.sample_table import SampleTable, open_duckdb
from tests.support.toy_shards import write_toy_dataset

NAN, INF = math.nan, math.inf
NUM_SAMPLES = 12
SCORE = [1.0, NAN, 4.0, INF, None, -NAN, 0.0, -INF, 2.5, NAN, 7.0, -3.0]
OTHER = [0.0, 1.0, 2.0, INF, 5.0, 1.0, 0.0, 1.0, None, NAN, -1.0, 1.0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "dataset"
    return write_toy_dataset(folder, num_samples=NUM_SAMPLES, samples_per_shard=5)


def write_scores(path, numbers=range(NUM_SAMPLES), **columns):
    columns = {"uid": [f"u{number}" for number in numbers]} | columns
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return str(path)


def chosen(dataset, **settings):
    selection = choose_samples(MakeSubset(dataset=dataset, output=dataset / "x.subset", **settings))
    return [number for number, is_kept in enumerate(selection.bitmap) if is_kept]


def missing(value):
    return value is None or math.isnan(value)


def quotient(a, b):
    if b == 0:
        return NAN if a == 0 else math.copysign(INF, a)
    return a / b


def both(condition):
    return lambda a, b: not missing(a) and not missing(b) and condition(a, b)


CONDITIONS = {
    "score > 2": lambda a, b: not missing(a) and a > 2,
    "NOT (score <= 2)": lambda a, b: not missing(a) and a > 2,
    "score >= 'inf'": lambda a, b: a == INF,
    "score != 1": lambda a, b: not missing(a) and a != 1,
    "score BETWEEN 0 AND 'inf'": lambda a, b: not missing(a) and a >= 0,
    "score NOT IN (1, 4)": lambda a, b: not missing(a) and a not in (1, 4),
    "score IS NULL": lambda a, b: missing(a),
    "isnan(score)": lambda a, b: False,
    "coalesce(score, 3) > 2": lambda a, b: missing(a) or a > 2,
    "score / other > 2": both(lambda a, b: quotient(a, b) > 2),
    "score - other > 0": both(lambda a, b: a - b > 0),
    "score * other >= 0": both(lambda a, b: a * b >= 0),
    "abs(score / other) BETWEEN 1 AND 3": both(lambda a, b: 1 <= abs(quotient(a, b)) <= 3),
    "(score / other) IN (2, 'inf')": both(lambda a, b: quotient(a, b) in (2, INF)),
    "(score / other > 2) = (score > 2)": both(
        lambda a, b: not missing(quotient(a, b)) and (quotient(a, b) > 2) == (a > 2)
    ),
    "list_max(pair) > 3": lambda a, b: max([v for v in (a, b) if not missing(v)], default=0) > 3,
    "place.x > 2": lambda a, b: not missing(a) and a > 2,
    "samples.score > 2 AND Score > 2": lambda a, b: not missing(a) and a > 2,
    "len(list_filter(list_transform(pair, lambda v: v / 0), lambda v: v > 3)) > 0": lambda a, b: (
        any(not missing(v) and v > 0 for v in (a, b))
    ),
    "len(list_filter(pair, lambda v: v > 3)) = 1": lambda a, b: (
        sum(not missing(v) and v > 3 for v in (a, b)) == 1
    ),
}


@pytest.fixture(scope="module")
def samples(dataset, tmp_path_factory):
    """Opens a table of samples with scores from two files, all of whose columns hold NaN."""
    folder = tmp_path_factory.mktemp("scores")
    pairs = [[a, b] for a, b in zip(SCORE, OTHER, strict=True)]
    for name, part in (("a", slice(0, 7)), ("b", slice(7, NUM_SAMPLES))):
        columns = {"score": SCORE[part], "other": OTHER[part], "pair": pairs[part]}
        columns["place"] = [{"x": value} for value in SCORE[part]]
        write_scores(folder / f"{name}.parquet", range(NUM_SAMPLES)[part], **columns)
    with open_duckdb(memory_gb=0.5, workers=1) as connection:
        table = SampleTable(connection, dataset)
        table.join_scores(str(folder / "*.parquet"), number=0, downloads=folder)
        yield connection


@pytest.mark.parametrize("where", CONDITIONS)
def test_nan_is_missing_in_every_condition(samples, where):
    condition = checked_condition(samples, where, view="samples")
    query = f"SELECT isopair_ordinal FROM samples WHERE {condition} ORDER BY 1"
    expected = [
        number
        for number, (a, b) in enumerate(zip(SCORE, OTHER, strict=True))
        if CONDITIONS[where](a, b)
    ]
    assert [number for (number,) in samples.execute(query).fetchall()] == expected


def test_a_condition_that_computes_nothing_is_left_as_it_is(samples):
    where = "score > 2 and  uid = 'u3' -- only this"
    assert checked_condition(samples, where, view="samples") == where


def test_the_top_of_a_column_never_holds_nan(dataset, tmp_path):
    scores = [write_scores(tmp_path / "s.parquet", score=SCORE)]
    best = sorted((n for n in range(NUM_SAMPLES) if not missing(SCORE[n])), key=lambda n: -SCORE[n])
    for fraction in (0.25, 0.5, 0.75):
        top = TopFraction(column="score", fraction=fraction)
        expected = sorted(best[: int(fraction * NUM_SAMPLES)])
        assert chosen(dataset, scores=scores, top=top) == expected


def test_nan_is_replaced_in_nested_lists_only_of_floats():
    assert [holds_floats(kind) for kind in ("FLOAT", "DOUBLE[]", "FLOAT[3][]")] == [True] * 3
    assert not any(holds_floats(kind) for kind in ("INTEGER", "VARCHAR[]", "STRUCT(a DOUBLE)"))
    assert without_nan("x", "BIGINT[]") == "x"


# ------------------------------------------------------------------- types of several files


@pytest.mark.parametrize("order", [("a", "b"), ("b", "a")])
def test_numbers_of_several_files_keep_their_values(dataset, tmp_path, order):
    """Writes integers and then fractions, and a column that only one file has."""
    columns = [{"score": [1, 0, 1, 0, 1, 0]}, {"Score": [0.6, 0.4] * 3, "extra": [7, 8] * 3}]
    parts = zip(order, columns, [range(6), range(6, 12)], strict=True)
    for name, values, numbers in parts:
        write_scores(tmp_path / f"{name}.parquet", numbers, **values)
    scores = [str(tmp_path / "*.parquet")]
    assert chosen(dataset, scores=scores, where="score > 0.5") == [0, 2, 4, 6, 8, 10]
    assert chosen(dataset, scores=scores, where="score = 1") == [0, 2, 4]
    assert chosen(dataset, scores=scores, where="extra = 8") == [7, 9, 11]


@pytest.mark.parametrize("values", [["x"] * 6, [0.5] * 6, [True] * 6])
def test_a_file_without_any_value_of_a_column_fits_the_others(dataset, tmp_path, values):
    write_scores(tmp_path / "a.parquet", range(6), mark=pyarrow.nulls(6))
    write_scores(tmp_path / "b.parquet", range(6, 12), mark=values)
    scores = [str(tmp_path / "*.parquet")]
    assert chosen(dataset, scores=scores, where="mark IS NOT NULL") == list(range(6, 12))


def test_numbers_and_text_in_one_column_are_refused(dataset, tmp_path):
    write_scores(tmp_path / "a.parquet", range(6), score=[1] * 6)
    write_scores(tmp_path / "b.parquet", range(6, 12), score=["1"] * 6)
    with pytest.raises(InputError, match=r"'score': expected BIGINT as in .*a.parquet, found VARC"):
        chosen(dataset, scores=[str(tmp_path / "*.parquet")], where="score = 1")


# ------------------------------------------------------------------------- time and session


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Kolkata"])
def test_a_subset_does_not_depend_on_the_time_zone(dataset, tmp_path, monkeypatch, zone):
    times = [datetime(2024, 1, 1, 2 * n, tzinfo=UTC) for n in range(NUM_SAMPLES)]
    scores = [write_scores(tmp_path / "s.parquet", taken=times)]
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        assert chosen(dataset, scores=scores, where="hour(taken) >= 20") == [10, 11]
        assert chosen(dataset, scores=scores, where="taken < '2024-01-01 04:00'") == [0, 1]
    finally:
        monkeypatch.undo()
        time.tzset()


SESSION_CALLS = (
    *("age(TIMESTAMP '2020-01-01') > INTERVAL 1 DAY", "current_localtimestamp() > '2020-01-01'"),
    *("current_setting('TimeZone') = 'UTC'", "version() > 'v1'", "txid_current() > 3"),
    *("getvariable('x') IS NULL", "current_schema() = 'main'", "ago(INTERVAL 1 DAY) IS NULL"),
    *("pg_postmaster_start_time() IS NULL", "user() = 'x'", "today() > DATE '2020-01-01'"),
)


@pytest.mark.parametrize("call", SESSION_CALLS)
def test_what_is_no_function_of_the_row_is_refused(samples, call):
    with pytest.raises(InputError, match="a subset must be reproducible"):
        checked_condition(samples, call, view="samples")


def test_functions_of_dates_in_the_row_are_kept(dataset, tmp_path):
    times = [datetime(2024, 1, 1 + n) for n in range(NUM_SAMPLES)]
    scores = [write_scores(tmp_path / "s.parquet", taken=times)]
    where = "age(TIMESTAMP '2024-01-04', taken) > INTERVAL 0 DAY"
    assert chosen(dataset, scores=scores, where=where) == [0, 1, 2]
    where = "dayofmonth(taken) > 5 AND pi() > 3 AND md5_number(uid) % 1 = 0"
    assert chosen(dataset, scores=scores, where=where) == list(range(5, 12))
