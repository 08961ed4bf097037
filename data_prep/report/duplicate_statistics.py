"""Statistics of the duplicates in one dataset, from a duplicates.parquet of find_duplicates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.dedup.duplicate_table import name_in_table
from data_prep.selection.sample_table import duckdb_errors, files_literal, open_duckdb
from data_prep.shards.subset import KeptSamples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

NUM_EXAMPLES = 3


@dataclass(frozen=True)
class MatchExample:
    """A dropped sample and the sample that it matches."""

    ordinal: int
    key: str
    match_ordinal: int
    match_key: str
    similarity: float


@dataclass(frozen=True)
class Matches:
    """Samples that one method drops for matches in one dataset."""

    method: str
    match_dataset: str
    is_this_dataset: bool
    num_samples: int
    examples: list[MatchExample]  # least similar first


@dataclass(frozen=True)
class DuplicateStatistics:
    """The duplicates of one dataset."""

    num_groups: int
    num_grouped: int  # samples in groups
    matches: list[Matches]


def measure_duplicates(
    folder: Path, kept: KeptSamples, *, memory_gb: float, workers: int
) -> DuplicateStatistics:
    """Counts the groups and matches of a dataset's samples.

    Args:
        folder: output folder of find_duplicates.
        kept: dataset, and optionally a subset.
        memory_gb: memory limit of DuckDB.
        workers: number of DuckDB threads.

    Raises:
        InputError: if the table is missing or damaged, or does not cover the dataset.
    """
    path = folder / "duplicates.parquet"
    name = name_in_table(path, dataset=kept.folder, info=kept.info)
    with duckdb_errors(str(path)), open_duckdb(memory_gb=memory_gb, workers=workers) as connection:
        source = f"read_parquet({files_literal([path])})"
        _add_view(connection, source, name=name, kept=kept)
        num_groups, num_grouped = connection.sql(
            'SELECT count(DISTINCT "group"), count(DISTINCT ordinal) FROM found'
        ).fetchall()[0]
        return DuplicateStatistics(num_groups, num_grouped, _matches(connection, name))


def _add_view(connection: DuckDBPyConnection, source: str, *, name: str, kept: KeptSamples) -> None:
    connection.execute("SET VARIABLE dataset = ?", [name])
    connection.execute(
        f"CREATE TEMP TABLE found AS SELECT * FROM {source} WHERE dataset = getvariable('dataset')"
    )
    if kept.subset is None:
        return
    ordinals = connection.sql("SELECT DISTINCT ordinal FROM found").fetchnumpy()["ordinal"]
    connection.register("kept", {"ordinal": ordinals[kept.subset.bitmap[ordinals]]})
    connection.execute("DELETE FROM found WHERE ordinal NOT IN (SELECT ordinal FROM kept)")


def _matches(connection: DuckDBPyConnection, name: str) -> list[Matches]:
    counts = connection.sql(
        "SELECT method, match_dataset, count(DISTINCT ordinal) FROM found WHERE NOT kept "
        "AND match_dataset IS NOT NULL GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    return [
        Matches(
            method=method,
            match_dataset=match_dataset,
            is_this_dataset=match_dataset == name,
            num_samples=num_samples,
            examples=_examples(connection, [method, match_dataset]),
        )
        for method, match_dataset, num_samples in counts
    ]


def _examples(connection: DuckDBPyConnection, values: list[Any]) -> list[MatchExample]:
    rows = connection.execute(
        "SELECT ordinal, key, match_ordinal, match_key, similarity FROM found WHERE NOT kept "
        "AND method = ? AND match_dataset = ? ORDER BY similarity, ordinal, match_ordinal LIMIT ?",
        [*values, NUM_EXAMPLES],
    ).fetchall()
    return [MatchExample(*row) for row in rows]
