"""Parquet files of earlier versions, whose checksums no manifest records, told apart by their rows.

A Parquet file belongs to a tar if its rows have the keys, sizes and checksums of the tar's media.
If the tar is lost, its index still tells the sizes. The footer is checked against the rows.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from data_prep.shards.index import ShardIndex
from data_prep.shards.manifest import ManifestRow
from data_prep.shards.parquet import parquet_bytes, read_shard_parquet
from data_prep.shards.sample import media_kind_of
from data_prep.shards.tar_index import read_tar_samples
from data_prep.shards.tar_members import BadTarError
from data_prep.workers import run_tasks

if TYPE_CHECKING:
    import pyarrow

COLUMNS = ("key", "extension", "bytes", "sha256")


@dataclass(frozen=True)
class Rows:
    """Checksums of the rows of a Parquet file, or of the samples that it should describe."""

    samples: str | None  # of keys, sizes and checksums of the media; None: unknown
    sizes: str


def parquet_sums(
    rows: Iterable[ManifestRow], sums: Mapping[Path, str | None], *, folder: Path, workers: int
) -> dict[Path, str]:
    """Finds the Parquet files of shards whose manifest rows record none.

    Args:
        rows: rows of the manifest.
        sums: sha256 of the files on disk.
        folder: dataset folder.
        workers: number of processes.

    Returns:
        {place of a Parquet file: sha256 of the file on disk that belongs there}
    """
    rows = [row for row in rows if row.parquet_sha256 is None]
    parquets = [path for path in sums if path.suffix == ".parquet"]
    if not rows or not parquets:
        return {}
    paths = {(path.suffix, sha256): path for path, sha256 in sums.items() if sha256}
    witnesses = {
        row.name: paths.get((".tar", row.tar_sha256)) or paths.get((".idx", row.index_sha256))
        for row in rows
    }
    read = [path for path in witnesses.values() if path is not None] + parquets
    found = dict(run_tasks(_rows_at, read, workers=workers))
    by_rows = {
        key: path
        for path in reversed(parquets)
        if (each := found[path]) is not None
        for key in (each.samples, each.sizes)
    }
    expected = {}
    for row in rows:
        place, right = folder / f"{row.name}.parquet", found.get(witnesses[row.name])
        if right is not None and (path := by_rows.get(right.samples or right.sizes)) is not None:
            in_place = found.get(place)
            is_in_place = in_place is not None and _are_equal(right, in_place)
            expected[place] = sums[place if is_in_place else path]
    return expected


def _are_equal(right: Rows, found: Rows) -> bool:
    if right.samples is None:
        return found.sizes == right.sizes
    return found.samples == right.samples


def _rows_at(path: Path) -> tuple[Path, Rows | None]:
    """Reads the rows of a Parquet file, a tar or an index; None if it is damaged."""
    read = {".parquet": _rows_of_parquet, ".tar": _rows_of_tar, ".idx": _rows_of_index}
    try:
        return path, read[path.suffix](path)
    except (InputError, BadTarError):
        return path, None


def _rows_of_parquet(path: Path) -> Rows:
    table = read_shard_parquet(path)
    if not set(COLUMNS) <= set(table.column_names):
        raise InputError(f"{path}: expected the columns {', '.join(COLUMNS)}")
    rows = [[row[name] for name in COLUMNS] for row in table.select(COLUMNS).to_pylist()]
    return Rows(_sum_of(rows), _sum_of([row[1:3] for row in rows]))


def _rows_of_tar(path: Path) -> Rows:
    rows = []
    for found in read_tar_samples(path):
        for extension, content in found.sample.members.items():
            if media_kind_of(extension) is not None:
                sha256 = hashlib.sha256(content).hexdigest()
                rows.append([found.sample.key, extension, len(content), sha256])
    return Rows(_sum_of(rows), _sum_of([row[1:3] for row in rows]))


def _rows_of_index(path: Path) -> Rows:
    index = ShardIndex.read(path)
    sizes = [
        [extension, num_bytes]
        for position in range(index.num_samples)
        for extension, (_, num_bytes, _) in index.entries_at(position).items()
        if media_kind_of(extension) is not None
    ]
    return Rows(None, _sum_of(sizes))


def _sum_of(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- footer

STATISTICS = (
    "SELECT path_in_schema, stats_min_value, stats_max_value, stats_null_count, num_values "
    "FROM parquet_metadata(?) ORDER BY row_group_id, column_id"
)


def footer_problem(path: Path, table: pyarrow.Table) -> str | None:
    """Returns the problem of a footer by which a reader would skip rows; None without one.

    Args:
        path: Parquet file.
        table: its rows; the checksums of its pages are valid.
    """
    import duckdb

    written_again = parquet_bytes(table)
    if path.read_bytes() == written_again:
        return None
    with tempfile.TemporaryDirectory(prefix="isopair-") as folder, duckdb.connect() as connection:
        right = Path(folder) / "right.parquet"
        right.write_bytes(written_again)
        try:
            found, expected = (
                connection.execute(STATISTICS, [str(each)]).fetchall() for each in (path, right)
            )
        except duckdb.Error as error:
            return f"{path}: damaged Parquet footer: {str(error).splitlines()[0]}"
    if len(found) != len(expected):  # other groups of rows, of another writer
        return None
    for (name, *values), (_, *right_values) in zip(found, expected, strict=True):
        pairs = zip(values, right_values, strict=True)
        if any(a != b for a, b in pairs if None not in (a, b)):
            return f"{path}: damaged Parquet footer: it contradicts the rows of column {name}"
    return None
