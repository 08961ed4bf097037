"""Counts, quantiles and histograms of one measure of a dataset's samples, computed by DuckDB."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.selection.sample_table import name_literal

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

QUANTILES = (0.05, 0.5, 0.95)
# Measures with at most this many distinct values are listed; others are shown as histograms.
MAX_LISTED_VALUES = 12
TOO_LARGE = 1e100  # larger values are excluded, because no axis can show them
NUM_MOST_FREQUENT = 40
_SIGNED_TYPES = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
WHOLE_TYPES = {*_SIGNED_TYPES, *(f"U{name}" for name in _SIGNED_TYPES)}
NUMBER_TYPES = WHOLE_TYPES | {"FLOAT", "DOUBLE"}
MAX_BINS = 32
# Bins are logarithmic above this ratio of maximum to median: with even bins, half of the values
# would fall into few bins.
LONG_TAIL = 8


@dataclass(frozen=True)
class Measure:
    """A quantity to count: an SQL expression over one of the views."""

    title: str
    expression: str
    unit: str = ""
    view: str = "kept_samples"


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers in bins, which include their lower edge and exclude their upper edge."""

    edges: list[float]  # [bins + 1]
    counts: list[int]  # [bins]
    is_logarithmic: bool  # whether the bins are for a logarithmic axis


@dataclass(frozen=True)
class Spread:
    """The range and quantiles of numbers."""

    minimum: float
    quantiles: tuple[float, ...]  # at QUANTILES: smallest value with this fraction at or below it
    maximum: float
    histogram: Histogram | None  # None: at most MAX_LISTED_VALUES distinct values


@dataclass(frozen=True)
class ValueCounts:
    """Counts of the values of a measure."""

    num_filled: int = 0  # number of values except NULL, NaN and values above TOO_LARGE
    num_distinct: int = 0
    num_repeated: int = 0  # number of distinct values that occur more than once
    most_frequent: list[tuple[Any, int]] = field(default_factory=list)
    smallest_count: int = 0  # count of the rarest value
    spread: Spread | None = None  # None: not numeric


def one_row(connection: DuckDBPyConnection, query: str, values: Sequence[Any] = ()) -> tuple:
    """Returns the only row that a query yields."""
    (row,) = connection.execute(query, values).fetchall()
    return row


def count_column(connection: DuckDBPyConnection, column: str) -> ValueCounts:
    """Counts the values of one column."""
    return count_values(connection, Measure(column, name_literal(column)))


def count_values(connection: DuckDBPyConnection, measure: Measure) -> ValueCounts:
    """Counts the values of a measure in one pass over the samples.

    The table `value_counts` has one row per distinct value; DuckDB spills it to disk if needed.
    """
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE value_counts AS "
        f"SELECT {measure.expression} AS value, count(*) AS num FROM {measure.view} GROUP BY value"
    )
    kind = one_row(connection, "SELECT any_value(typeof(value)) FROM value_counts")[0]
    # Deleted here, so that the expression is computed only once per row.
    is_left_out = f" OR NOT abs(value) < {TOO_LARGE}" if kind in ("FLOAT", "DOUBLE") else ""
    connection.execute(f"DELETE FROM value_counts WHERE value IS NULL{is_left_out}")
    num_filled, num_distinct, num_repeated, smallest_count = one_row(
        connection,
        "SELECT sum(num)::BIGINT, count(*), count(*) FILTER (num > 1), min(num) FROM value_counts",
    )
    if not num_distinct:
        return ValueCounts()
    frequent = "SELECT value, num FROM value_counts ORDER BY num DESC, value LIMIT ?"
    is_whole = kind in WHOLE_TYPES
    return ValueCounts(
        num_filled=num_filled,
        num_distinct=num_distinct,
        num_repeated=num_repeated,
        most_frequent=connection.execute(frequent, [NUM_MOST_FREQUENT]).fetchall(),
        smallest_count=smallest_count,
        spread=_spread(connection, num_filled, num_distinct, is_whole=is_whole)
        if kind in NUMBER_TYPES
        else None,
    )


def _spread(
    connection: DuckDBPyConnection, num_filled: int, num_distinct: int, *, is_whole: bool
) -> Spread:
    quantiles = ", ".join(
        f"min(value) FILTER (up_to >= {quantile} * {num_filled})" for quantile in QUANTILES
    )
    minimum, *found, maximum = one_row(
        connection,
        f"WITH running AS (SELECT value, sum(num) OVER (ORDER BY value) AS up_to FROM value_counts)"
        f" SELECT min(value), {quantiles}, max(value) FROM running",
    )
    histogram = None
    if num_distinct > MAX_LISTED_VALUES:
        median = found[QUANTILES.index(0.5)]
        edges, is_logarithmic = histogram_edges(minimum, median, maximum, is_whole=is_whole)
        counts = _bin_counts(connection, edges, is_whole=is_whole)
        histogram = Histogram(edges, counts, is_logarithmic)
    return Spread(minimum, tuple(found), maximum, histogram)


def _bin_counts(
    connection: DuckDBPyConnection, edges: Sequence[float], *, is_whole: bool
) -> list[int]:
    kind = "HUGEINT" if is_whole else "DOUBLE"
    rows = connection.execute(
        "SELECT bin, sum(num)::BIGINT FROM value_counts ASOF JOIN "
        f"(SELECT unnest(?::{kind}[]) AS edge, unnest(range(?)) AS bin) ON value >= edge "
        "GROUP BY bin",
        [list(edges), len(edges)],
    ).fetchall()
    by_bin = dict(rows)
    return [by_bin.get(index, 0) for index in range(len(edges) - 1)]


def histogram_edges(
    minimum: float, median: float, maximum: float, *, is_whole: bool
) -> tuple[list[float], bool]:
    """Chooses round bin edges for a histogram; bins are logarithmic for long-tailed values.

    Args:
        minimum: minimum of the values.
        median: median of the values.
        maximum: maximum of the values, above `minimum`.
        is_whole: whether all values are integers; the edges are then also integers.

    Returns:
        (edges, is_logarithmic); the first edge is at most `minimum`, the last is above `maximum`.
    """
    if minimum > 0 and maximum > LONG_TAIL * median:
        return _ratio_edges(minimum, maximum, is_whole=is_whole), True
    return _step_edges(minimum, maximum, is_whole=is_whole), False


def _ratio_edges(minimum: float, maximum: float, *, is_whole: bool) -> list[float]:
    """Chooses up to four bins per doubling; edges are exact in binary: 1, 1.25, 1.5, 1.75, 2."""
    from matplotlib.ticker import LogLocator

    low, high = math.frexp(minimum)[1] - 1, math.frexp(maximum)[1]
    parts = next((parts for parts in (4, 2) if parts * (high - low) <= MAX_BINS), 1)
    locator = LogLocator(base=2, subs=1 + np.arange(parts) / parts, numticks=MAX_BINS + 1)
    edges = locator.tick_values(math.ldexp(1, low), math.ldexp(1, high)).tolist()
    if is_whole:
        edges = [int(edge) for edge in edges if edge == int(edge)]
    edges = _increasing(edges)
    start = max(index for index, edge in enumerate(edges) if edge <= minimum)
    end = min(index for index, edge in enumerate(edges) if edge > maximum)
    return edges[start : end + 1]


def _step_edges(minimum: float, maximum: float, *, is_whole: bool) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    low, high = Decimal(minimum), Decimal(maximum)
    locator = MaxNLocator(MAX_BINS, steps=(1, 2, 5, 10), integer=is_whole)
    ticks = locator.tick_values(0, float(high - low))
    # Decimal, because multiples of a step such as 0.05 are not round in binary.
    step = Decimal(f"{ticks[1] - ticks[0]:.0e}")
    index = (low / step).to_integral_value("ROUND_FLOOR")
    number = int if is_whole else float
    edges = [number(index * step)]
    while edges[-1] <= maximum:
        index += 1
        edges.append(number(index * step))
    return _increasing(edges)


def _increasing(edges: list[float]) -> list[float]:
    """Removes repeated edges: a step may be smaller than the distance of floating-point numbers."""
    return edges[:1] + [edge for last, edge in pairwise(edges) if edge > last]
