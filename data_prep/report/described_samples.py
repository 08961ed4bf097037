"""The samples of a data sheet as DuckDB views, which are never loaded into memory as a whole.

The view `kept_samples` has the columns of the Parquet files and the ordinal of each sample. The
view `captions` has one row per caption. If there is a subset, both contain only kept samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.selection.sample_table import (
    ORDINAL,
    SampleTable,
    duckdb_errors,
    name_literal,
    open_duckdb,
)
from data_prep.shards.columns import built_in_columns, member_columns
from data_prep.shards.subset import KeptSamples

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

RANKS_AT_ONCE = 1_000_000


def missing_sidecars(kept: KeptSamples) -> list[Path]:
    """Lists the missing Parquet files of a dataset."""
    paths = (kept.folder / f"{row.name}.parquet" for row in kept.dataset.manifest)
    return [path for path in paths if not path.exists()]


@contextmanager
def open_described_samples(
    kept: KeptSamples, *, memory_gb: float, workers: int
) -> Iterator[DuckDBPyConnection]:
    """Opens a connection with the views `kept_samples` and `captions`.

    For samples of modalities, `show_modality` and `show_all` make these views.

    Args:
        kept: dataset with all its Parquet files, and optionally a subset.
        memory_gb: memory limit of DuckDB, which spills to a temporary folder on disk (TMPDIR).
        workers: number of DuckDB threads.

    Raises:
        InputError: if a Parquet file is damaged, lacks a column or has the wrong number of rows.
            Also if the memory or the temporary folder is too small.
    """
    with (
        duckdb_errors(str(kept.folder)),
        open_duckdb(memory_gb=memory_gb, workers=workers) as connection,
    ):
        SampleTable(connection, kept.folder)
        _check_columns(connection, kept)
        condition = ""
        if kept.subset is not None:
            _add_kept_ordinals(connection, kept)
            condition = f" WHERE {ORDINAL} IN (SELECT ordinal FROM kept_ordinals)"
        connection.execute(f"CREATE VIEW all_samples AS SELECT * FROM samples{condition}")
        if kept.dataset.modalities.is_pair:
            _make_views(connection, "SELECT * FROM all_samples")
        yield connection


def show_modality(connection: DuckDBPyConnection, modalities: Modalities, name: str) -> None:
    """Makes the views show the samples that have one modality, with the columns of a pair.

    Args:
        connection: connection of `open_described_samples`.
        modalities: modalities of the dataset.
        name: modality to show.
    """
    columns = ["key", ORDINAL]
    if modalities[name].kind == "text":
        columns.append(f"{name_literal(name)} AS captions")
    else:
        columns.append("NULL::VARCHAR[] AS captions")
        columns += [
            f"{name_literal(f'{name}_{column}')} AS {name_literal(column)}"
            for column, _ in member_columns(modalities[name].kind)
        ]
    query = f"SELECT {', '.join(columns)} FROM all_samples WHERE {name_literal('has_' + name)}"
    _make_views(connection, query)


def show_all(connection: DuckDBPyConnection) -> None:
    """Makes the view `kept_samples` show all columns of all samples of modalities."""
    _make_views(connection, "SELECT *, NULL::VARCHAR[] AS captions FROM all_samples")


def _make_views(connection: DuckDBPyConnection, query: str) -> None:
    connection.execute(f"CREATE OR REPLACE VIEW kept_samples AS {query}")
    connection.execute(
        "CREATE OR REPLACE VIEW captions AS SELECT unnest(captions) AS caption FROM kept_samples"
    )


def _check_columns(connection: DuckDBPyConnection, kept: KeptSamples) -> None:
    missing = built_in_columns(kept.dataset.modalities) - set(column_types(connection))
    if missing:
        raise InputError(
            f"{kept.folder}: expected Parquet files with a column {min(missing)!r}, found none; "
            "create them with python -m data_prep.index_shards and measure=true"
        )


def _add_kept_ordinals(connection: DuckDBPyConnection, kept: KeptSamples) -> None:
    connection.execute("CREATE TABLE kept_ordinals (ordinal BIGINT)")
    for start in range(0, len(kept), RANKS_AT_ONCE):
        ranks = np.arange(start, min(start + RANKS_AT_ONCE, len(kept)))
        connection.register("batch", {"ordinal": kept.ordinals_of(ranks)})
        connection.execute("INSERT INTO kept_ordinals SELECT ordinal FROM batch")
        connection.unregister("batch")


def column_types(connection: DuckDBPyConnection) -> dict[str, str]:
    """Returns {column: SQL type} of the Parquet files."""
    rows = connection.execute("DESCRIBE samples").fetchall()
    return {name: kind for name, kind, *_ in rows if name != ORDINAL}
