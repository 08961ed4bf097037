"""Statistics of the samples of a dataset, computed by DuckDB from the views of described_samples.

Every function takes a connection and returns plain values. Equal samples have exactly equal
statistics, because neither sums of rounded numbers nor sketches are used.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from data_prep.modalities.modality import Modalities
from data_prep.report.described_samples import column_types, show_all, show_modality
from data_prep.report.value_counts import (
    Measure,
    ValueCounts,
    count_column,
    count_values,
    one_row,
)
from data_prep.selection.sample_table import ORDINAL
from data_prep.shards.columns import built_in_columns, own_columns
from data_prep.shards.index import (
    ABSENT,
    ShardIndex,
)
from data_prep.shards.subset import KeptSamples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


NUM_DUPLICATES_SHOWN = 5
# Unicode names of scripts.
SCRIPTS = (
    *("Latin", "Cyrillic", "Greek", "Arabic", "Hebrew", "Devanagari", "Bengali", "Tamil"),
    *("Telugu", "Thai", "Georgian", "Armenian", "Ethiopic", "Khmer", "Han", "Hiragana"),
    *("Katakana", "Hangul"),
)
_WORDS = r"""(SELECT unnest(regexp_extract_all(lower(caption), '[\p{L}\p{M}\p{N}'']+')) AS word
              FROM captions)"""
_TAGS = "(SELECT unnest(marks) AS tag FROM kept_samples)"
_NUM_REENCODED = "SELECT sum(is_reencoded::INT) FROM kept_samples"


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
        Measure("Size of an image", "bytes", "bytes"),
    ),
    "audio": (
        Measure("Duration", "round(seconds, 3)", "seconds"),
        Measure("Sample rate", "sample_rate_hz", "Hz"),
        Measure("Channels", "channels"),
        Measure("Size of a clip", "bytes", "bytes"),
    ),
    "vector": (Measure("Length in time", "length"),),
}


NO_COUNTS = ValueCounts()


@dataclass(frozen=True)
class DatasetStatistics:
    """Statistics from the Parquet files.

    Those of one modality, and those of all samples of modalities, leave the other fields empty.
    """

    # only measures that some sample has
    measures: dict[Measure, ValueCounts] = field(default_factory=dict)
    captions: ValueCounts = NO_COUNTS
    words: ValueCounts = NO_COUNTS
    # script -> number of captions with a letter of this script
    scripts: dict[str, int] = field(default_factory=dict)
    languages: ValueCounts = NO_COUNTS
    class_names: ValueCounts = NO_COUNTS
    tags: ValueCounts = NO_COUNTS  # filters that flagged samples without dropping them
    num_reencoded: int | None = None  # None: not recorded
    total_seconds: float | None = None  # None: images, or not recorded
    hashes: ValueCounts = NO_COUNTS  # sha256 of the media
    # (samples with equal media, first keys)
    duplicate_keys: list[tuple[int, list[str]]] = field(default_factory=list)
    # kept column -> (type, values)
    kept: dict[str, tuple[str, ValueCounts]] = field(default_factory=dict)


def measure_dataset(connection: DuckDBPyConnection, media: str) -> DatasetStatistics:
    """Computes all statistics of the samples.

    Args:
        connection: connection of `open_described_samples`.
        media: "image" or "audio".
    """
    types = column_types(connection)
    kept = [name for name in types if name not in own_columns(media)]
    measures = {
        measure: count_values(connection, measure)
        for measure in (*CAPTION_MEASURES, *MEDIA_MEASURES[media])
    }
    hashes = count_column(connection, "sha256")
    return DatasetStatistics(
        measures={measure: counts for measure, counts in measures.items() if counts.num_filled},
        captions=count_values(connection, Measure("captions", "caption", view="captions")),
        words=count_values(connection, Measure("words", "word", view=_WORDS)),
        scripts=count_scripts(connection),
        languages=count_column(connection, "language"),
        class_names=count_column(connection, "class_name"),
        tags=count_values(connection, Measure("tags", "tag", view=_TAGS)),
        num_reencoded=one_row(connection, _NUM_REENCODED)[0],
        total_seconds=_total_seconds(connection) if media == "audio" else None,
        hashes=hashes,
        duplicate_keys=duplicate_keys(connection, hashes),
        kept={name: (types[name], count_column(connection, name)) for name in kept},
    )


def measure_modality(
    connection: DuckDBPyConnection, modalities: Modalities, name: str
) -> DatasetStatistics:
    """Computes the statistics of one modality over the samples that have it.

    Args:
        connection: connection of `open_described_samples`.
        modalities: modalities of the dataset.
        name: name of the modality.
    """
    show_modality(connection, modalities, name)
    kind = modalities[name].kind
    if kind == "text":
        counted = {each: count_values(connection, each) for each in CAPTION_MEASURES}
        return DatasetStatistics(
            measures={each: counts for each, counts in counted.items() if counts.num_filled},
            captions=count_values(connection, Measure("captions", "caption", view="captions")),
            words=count_values(connection, Measure("words", "word", view=_WORDS)),
            scripts=count_scripts(connection),
        )
    counted = {each: count_values(connection, each) for each in MEDIA_MEASURES[kind]}
    hashes = count_column(connection, "sha256")
    is_media = kind in ("image", "audio")
    return DatasetStatistics(
        measures={each: counts for each, counts in counted.items() if counts.num_filled},
        num_reencoded=one_row(connection, _NUM_REENCODED)[0] if is_media else None,
        total_seconds=_total_seconds(connection) if kind == "audio" else None,
        hashes=hashes,
        duplicate_keys=duplicate_keys(connection, hashes),
    )


def measure_samples(connection: DuckDBPyConnection, modalities: Modalities) -> DatasetStatistics:
    """Computes the statistics of samples of modalities that belong to no modality."""
    show_all(connection)
    types = column_types(connection)
    kept = [name for name in types if name not in built_in_columns(modalities)]
    return DatasetStatistics(
        languages=count_column(connection, "language"),
        class_names=count_column(connection, "class_name"),
        tags=count_values(connection, Measure("tags", "tag", view=_TAGS)),
        kept={name: (types[name], count_column(connection, name)) for name in kept},
    )


def count_subsets(kept: KeptSamples) -> dict[tuple[str, ...], int]:
    """Counts the kept samples by the modalities that they have, the most frequent first.

    Raises:
        InputError: if an index is missing or damaged.
    """
    counts: Counter[int] = Counter()
    dataset = kept.dataset
    for shard in range(len(dataset.manifest)):
        masks = dataset.presence(shard)
        if kept.subset is not None:
            start, end = dataset.shard_starts[shard : shard + 2]
            masks = masks[kept.subset.bitmap[start:end]]
        found, numbers = np.unique(masks, return_counts=True)
        counts.update(dict(zip(found.tolist(), numbers.tolist(), strict=True)))
    order = sorted(counts, key=lambda mask: (-counts[mask], mask))
    return {dataset.modalities.names_in(mask): counts[mask] for mask in order}


def count_scripts(connection: DuckDBPyConnection) -> dict[str, int]:
    """Counts the captions with a letter of each script, the most frequent script first."""
    others = ", ".join(
        rf"count(*) FILTER (regexp_matches(caption, '\p{{{script}}}'))" for script in SCRIPTS
    )
    # ASCII captions have as many bytes as characters; one expression suffices for them.
    is_ascii = "strlen(caption) = length(caption)"
    counts = one_row(connection, f"SELECT {others} FROM captions WHERE NOT ({is_ascii})")
    in_ascii = one_row(
        connection,
        f"SELECT count(*) FROM captions WHERE {is_ascii} AND regexp_matches(caption, '[A-Za-z]')",
    )[0]
    by_script = dict(zip(SCRIPTS, counts, strict=True))
    by_script["Latin"] += in_ascii
    found = {script: num for script, num in by_script.items() if num}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _total_seconds(connection: DuckDBPyConnection) -> float | None:
    query = "SELECT sum(round(seconds * 1000)::HUGEINT) FROM kept_samples"
    milliseconds = one_row(connection, query)
    return None if milliseconds[0] is None else int(milliseconds[0]) / 1000


def duplicate_keys(
    connection: DuckDBPyConnection, hashes: ValueCounts
) -> list[tuple[int, list[str]]]:
    """Finds the largest groups of samples with equal media: (size, keys of the first four).

    Args:
        connection: connection of `open_described_samples`.
        hashes: counts of the column sha256.
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
    """The members with one extension."""

    num_samples: int = 0
    num_bytes: int = 0


def count_members(kept: KeptSamples) -> dict[str, MemberCount]:
    """Counts the members of kept samples and their bytes by extension.

    Raises:
        InputError: if an index is missing or damaged.
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
