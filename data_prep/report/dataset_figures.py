"""The figures of a dataset's samples: what duckdb counts in the views of described_samples.

Every function takes a connection and returns plain values. The same samples give the same figures,
to the last digit: no sum of rounded numbers and no sketch is among them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.report.described_samples import column_types
from data_prep.report.histogram_bins import histogram_edges
from data_prep.selection.sample_table import ORDINAL, name_literal
from data_prep.shards.columns import own_columns
from data_prep.shards.index import (
    ABSENT,
    ShardIndex,
)
from data_prep.shards.subset import KeptSamples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


QUANTILES = (0.05, 0.5, 0.95)
# Values of fewer kinds are listed with their counts; more get a histogram.
MOST_LISTED_VALUES = 12
TOO_LARGE = 1e100  # no axis can show it
NUM_MOST_FREQUENT = 40
NUM_DUPLICATES_SHOWN = 5
WHOLE_TYPES = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT"}
NUMBER_TYPES = WHOLE_TYPES | {"FLOAT", "DOUBLE"}
# As Unicode names them: letters that captions are written in.
SCRIPTS = (
    *("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil"),
    *("Telugu", "Thai", "Georgian", "Armenian", "Ethiopic", "Khmer", "Han", "Hiragana"),
    *("Katakana", "Hangul"),
)
_WORDS = r"""(SELECT unnest(regexp_extract_all(lower(caption), '[\p{L}\p{M}\p{N}'']+')) AS word
              FROM captions)"""
_MARKS = "(SELECT unnest(marks) AS mark FROM kept_samples)"
_NUM_REENCODED = "SELECT sum(is_reencoded::INT) FROM kept_samples"


WHOLE_TYPES |= {f"U{name}" for name in WHOLE_TYPES}


@dataclass(frozen=True)
class Measure:
    """Something that is counted: an expression over one of the views."""

    title: str
    expression: str
    unit: str = ""
    view: str = "kept_samples"


CAPTION_MEASURES = (
    Measure(
        "Words in a caption",
        r"len(regexp_extract_all(caption, '[^\s\p{Z}]+'))",
        view="captions",
    ),
    Measure("Characters in a caption", "length(caption)", view="captions"),
    Measure("Captions of a sample", "len(captions)"),
)


MEDIA_MEASURES = {
    "image": (
        Measure("Width", "width", "pixels"),
        Measure("Height", "height", "pixels"),
        Measure("Shorter side", "least(width, height)", "pixels"),
        Measure("Width divided by height", "round(width / height, 2)"),
        Measure("Megapixels", "width * height::BIGINT / 1e6"),
        Measure("Size of a picture", "bytes", "bytes"),
    ),
    "audio": (
        Measure("Duration", "round(seconds, 3)", "seconds"),
        Measure("Sample rate", "sample_rate_hz", "Hz"),
        Measure("Channels", "channels"),
        Measure("Size of a clip", "bytes", "bytes"),
    ),
}


@dataclass(frozen=True)
class Histogram:
    """Counts of numbers; the bins hold their lower edge and not their upper one."""

    edges: list[float]  # [bins + 1]
    counts: list[int]  # [bins]
    is_in_ratios: bool


@dataclass(frozen=True)
class Spread:
    """Where numbers lie."""

    least: float
    quantiles: tuple[float, ...]  # at QUANTILES: the least value that has this share at or below
    largest: float
    histogram: Histogram | None  # None: there are at most MOST_LISTED_VALUES different ones


@dataclass(frozen=True)
class ValueCounts:
    """How often each value of a measure occurs."""

    num_filled: int = 0  # neither NULL nor NaN nor of TOO_LARGE size
    num_distinct: int = 0
    num_repeated: int = 0  # values that occur more than once
    most_frequent: list[tuple[Any, int]] = field(default_factory=list)
    least_count: int = 0  # of the rarest value
    spread: Spread | None = None  # of numbers


@dataclass(frozen=True)
class DatasetFigures:
    """Everything that the sidecars tell."""

    measures: dict[Measure, ValueCounts]  # without those that no sample has
    captions: ValueCounts
    words: ValueCounts
    scripts: dict[str, int]  # script -> captions that have a letter of it
    languages: ValueCounts
    class_names: ValueCounts
    marks: ValueCounts
    num_reencoded: int | None  # None: not recorded
    total_seconds: float | None  # None: pictures, or not recorded
    hashes: ValueCounts  # of the media
    duplicate_keys: list[tuple[int, list[str]]]  # (number of samples with equal media, first keys)
    kept: dict[str, tuple[str, ValueCounts]]  # column of the user -> (type, values)


def measure_dataset(connection: DuckDBPyConnection, media: str) -> DatasetFigures:
    """All figures of the samples.

    Args:
        connection: of open_described_samples.
        media: "image" or "audio".
    """
    types = column_types(connection)
    kept = [name for name in types if name not in own_columns(media)]
    measures = {
        measure: count_values(connection, measure)
        for measure in (*CAPTION_MEASURES, *MEDIA_MEASURES[media])
    }
    hashes = count_column(connection, "sha256")
    return DatasetFigures(
        measures={measure: counts for measure, counts in measures.items() if counts.num_filled},
        captions=count_values(connection, Measure("captions", "caption", view="captions")),
        words=count_values(connection, Measure("words", "word", view=_WORDS)),
        scripts=count_scripts(connection),
        languages=count_column(connection, "language"),
        class_names=count_column(connection, "class_name"),
        marks=count_values(connection, Measure("marks", "mark", view=_MARKS)),
        num_reencoded=_one_row(connection, _NUM_REENCODED)[0],
        total_seconds=_total_seconds(connection) if media == "audio" else None,
        hashes=hashes,
        duplicate_keys=duplicate_keys(connection, hashes),
        kept={name: (types[name], count_column(connection, name)) for name in kept},
    )


def _one_row(connection: DuckDBPyConnection, query: str, values: Sequence[Any] = ()) -> tuple:
    (row,) = connection.execute(query, values).fetchall()
    return row


def count_column(connection: DuckDBPyConnection, column: str) -> ValueCounts:
    """The values of one column."""
    return count_values(connection, Measure(column, name_literal(column)))


def count_values(connection: DuckDBPyConnection, measure: Measure) -> ValueCounts:
    """The values of a measure, from one pass over the samples.

    What follows works on `value_counts`: one row per different value, which duckdb puts on disk
    where it is long.
    """
    connection.execute(
        "CREATE OR REPLACE TEMP TABLE value_counts AS "
        f"SELECT {measure.expression} AS value, count(*) AS num FROM {measure.view} GROUP BY value"
    )
    kind = _one_row(connection, "SELECT any_value(typeof(value)) FROM value_counts")[0]
    # Only now, so that the expression is computed once for each row.
    is_left_out = f" OR NOT abs(value) < {TOO_LARGE}" if kind in ("FLOAT", "DOUBLE") else ""
    connection.execute(f"DELETE FROM value_counts WHERE value IS NULL{is_left_out}")
    num_filled, num_distinct, num_repeated, least_count = _one_row(
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
        least_count=least_count,
        spread=_spread(connection, num_filled, num_distinct, is_whole=is_whole)
        if kind in NUMBER_TYPES
        else None,
    )


def _spread(
    connection: DuckDBPyConnection, num_filled: int, num_distinct: int, *, is_whole: bool
) -> Spread:
    quantiles = ", ".join(
        f"min(value) FILTER (up_to >= {share} * {num_filled})" for share in QUANTILES
    )
    least, *found, largest = _one_row(
        connection,
        f"WITH running AS (SELECT value, sum(num) OVER (ORDER BY value) AS up_to FROM value_counts)"
        f" SELECT min(value), {quantiles}, max(value) FROM running",
    )
    histogram = None
    if num_distinct > MOST_LISTED_VALUES:
        median = found[QUANTILES.index(0.5)]
        edges, is_in_ratios = histogram_edges(least, median, largest, is_whole=is_whole)
        counts = _bin_counts(connection, edges, is_whole=is_whole)
        histogram = Histogram(edges, counts, is_in_ratios)
    return Spread(least, tuple(found), largest, histogram)


def _bin_counts(
    connection: DuckDBPyConnection, edges: Sequence[float], *, is_whole: bool
) -> list[int]:
    kind = "HUGEINT" if is_whole else "DOUBLE"
    rows = connection.execute(
        "SELECT place, sum(num)::BIGINT FROM value_counts ASOF JOIN "
        f"(SELECT unnest(?::{kind}[]) AS edge, unnest(range(?)) AS place) ON value >= edge "
        "GROUP BY place",
        [list(edges), len(edges)],
    ).fetchall()
    by_place = dict(rows)
    return [by_place.get(place, 0) for place in range(len(edges) - 1)]


def count_scripts(connection: DuckDBPyConnection) -> dict[str, int]:
    """Script -> captions that have a letter of it, the most frequent first."""
    others = ", ".join(
        rf"count(*) FILTER (regexp_matches(caption, '\p{{{script}}}'))" for script in SCRIPTS
    )
    # Captions in ASCII have as many bytes as characters, and need one expression instead of all.
    is_ascii = "strlen(caption) = length(caption)"
    counts = _one_row(connection, f"SELECT {others} FROM captions WHERE NOT ({is_ascii})")
    in_ascii = _one_row(
        connection,
        f"SELECT count(*) FROM captions WHERE {is_ascii} AND regexp_matches(caption, '[A-Za-z]')",
    )[0]
    by_script = dict(zip(SCRIPTS, counts, strict=True))
    by_script["Latin"] += in_ascii
    found = {script: num for script, num in by_script.items() if num}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _total_seconds(connection: DuckDBPyConnection) -> float | None:
    query = "SELECT sum(round(seconds * 1000)::HUGEINT) FROM kept_samples"
    milliseconds = _one_row(connection, query)
    return None if milliseconds[0] is None else int(milliseconds[0]) / 1000


def duplicate_keys(
    connection: DuckDBPyConnection, hashes: ValueCounts
) -> list[tuple[int, list[str]]]:
    """The largest groups of samples with equal media: (size, keys of the first four).

    Args:
        connection: of open_described_samples.
        hashes: the values of the column sha256.
    """
    repeated = [(sha256, num) for sha256, num in hashes.most_frequent if num > 1]
    groups = []
    for sha256, num in repeated[:NUM_DUPLICATES_SHOWN]:
        query = f"SELECT key FROM kept_samples WHERE sha256 = ? ORDER BY {ORDINAL} LIMIT 4"
        keys = connection.execute(query, [sha256]).fetchall()
        groups.append((num, [key for (key,) in keys]))
    return groups


@dataclass
class MemberCount:
    """Members of one extension."""

    num_samples: int = 0
    num_bytes: int = 0


def count_members(kept: KeptSamples) -> dict[str, MemberCount]:
    """Extension -> how many of the kept samples have such a member, and its bytes in all.

    Raises:
        InputError: an index is missing or damaged.
    """
    counts: dict[str, MemberCount] = defaultdict(MemberCount)
    is_kept = None if kept.subset is None else kept.subset.bitmap
    for shard, row in enumerate(kept.dataset.manifest):
        index = ShardIndex.read(kept.folder / f"{row.name}.idx")
        table = index.table  # uint32 [n, k, 3]
        if is_kept is not None:
            start, end = kept.dataset.shard_starts[shard : shard + 2]
            table = table[is_kept[start:end]]
        is_present = table[:, :, 0] != ABSENT  # [n, k]
        sizes = np.where(is_present, table[:, :, 1], 0).sum(axis=0, dtype=np.int64)
        for member, num, size in zip(index.fields, is_present.sum(axis=0), sizes, strict=True):
            counts[member].num_samples += int(num)
            counts[member].num_bytes += int(size)
    return dict(sorted(counts.items()))
