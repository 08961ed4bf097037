"""Task and report of the repair of a shard, and what the manifest records of its samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.columns import KeptType
from data_prep.shards.index import BLOCK_BYTES, ShardIndex
from data_prep.shards.manifest import ManifestRow, manifest_row
from data_prep.shards.parquet import check_parquet_sum, checksum_columns, read_shard_parquet
from data_prep.shards.tar_index import IndexTask
from data_prep.shards.tar_members import find_members
from data_prep.storage.atomic import sha256_of
from data_prep.verify.damaged_files import DAMAGED_FOLDER
from data_prep.verify.indexed_tar import walk_tar

if TYPE_CHECKING:
    import pyarrow

KEYS_NAMED = 100
DAMAGED = "damaged"  # reason under which an index counts lost samples


@dataclass(frozen=True)
class RepairTask:
    """A worker's task: the shard to repair."""

    folder: Path
    tar_folder: Path
    name: str
    row: ManifestRow | None  # None: not listed by manifest.jsonl, or unreadable
    modalities: Modalities
    has_parquet: bool
    kept: Mapping[str, KeptType]
    foreign: IndexTask | None  # task that indexes a foreign tar again; None: not foreign
    # (rejected, marked), if they can be computed from dataset.json and the other shards
    counts: tuple[dict[str, int], dict[str, int]] | None

    @property
    def tar_path(self) -> Path:
        """The path of the tar."""
        return self.tar_folder / f"{self.name}.tar"

    @property
    def index_path(self) -> Path:
        """The path of the index."""
        return self.folder / f"{self.name}.idx"

    @property
    def parquet_path(self) -> Path:
        """The path of the Parquet file."""
        return self.folder / f"{self.name}.parquet"


@dataclass
class RepairReport:
    """The result of a repair, as lines for the user."""

    done: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)  # problems that require manual work
    is_undecided: bool = False  # whether a shard's files must not be taken into the manifest


def read_index(path: Path) -> ShardIndex | None:
    """Returns the index, or None if it is missing or damaged."""
    try:
        return ShardIndex.read(path)
    except InputError:
        return None


def recorded_keys(path: Path, row: ManifestRow) -> list[str]:
    """Returns the keys of a shard's samples from its Parquet file; [] unless it is as recorded."""
    table = _recorded_table(path, row)
    return [] if table is None else table["key"].to_pylist()


def _recorded_table(path: Path, row: ManifestRow) -> pyarrow.Table | None:
    """Reads a Parquet file that is as the manifest records; None if it is not.

    Earlier versions recorded only the number of rows.
    """
    try:
        check_parquet_sum(path, row)
        table = read_shard_parquet(path)
    except InputError:
        return None
    return table if "key" in table.column_names and table.num_rows == row.num_samples else None


def named_keys(keys: Sequence[str]) -> str:
    """Returns "; lost: <number>: <keys>", or an empty text for no keys."""
    if not keys:
        return ""
    more = f", and {len(keys) - KEYS_NAMED} more" if len(keys) > KEYS_NAMED else ""
    return f"; lost: {len(keys)}: {', '.join(keys[:KEYS_NAMED])}{more}"


def is_of_another_dataset(task: RepairTask, index: ShardIndex) -> bool:
    """Returns True for a tar and an index that fit each other, but hold no recorded sample.

    Such files may also be the work of an interrupted repair. Then some samples are recorded, or the
    index counts damaged ones and `damaged/` holds the tar before the repair.
    """
    row = task.row
    if row is None or sha256_of(task.index_path) == row.index_sha256:
        return False
    tar_sha256 = sha256_of(task.tar_path)
    if tar_sha256 == row.tar_sha256 or index.tar_sha256 != tar_sha256:
        return False
    recorded, found = _recorded_media(task), _media_in_tar(task)
    if recorded is not None:
        return recorded.isdisjoint(found)
    was_repaired = (task.folder / DAMAGED_FOLDER / f"{task.name}.tar").is_file()
    return not (index.rejected.get(DAMAGED) and was_repaired)


def _recorded_media(task: RepairTask) -> set[str] | None:
    """Returns the sha256 of the media that the manifest records by its Parquet file.

    None if they are unknown. This includes a Parquet file that fits the tar but not the manifest,
    which may be of the same other dataset.
    """
    table = _recorded_table(task.parquet_path, task.row)
    if table is None:
        return None
    columns = checksum_columns(task.modalities)
    if not columns or not set(columns) <= set(table.column_names):
        return None
    recorded = {sha256 for column in columns for sha256 in table[column].to_pylist()} - {None}
    is_sealed = task.row.parquet_sha256 is not None
    return recorded if is_sealed or recorded != _media_in_tar(task) else None


def _media_in_tar(task: RepairTask) -> set[str]:
    """Returns the sha256 of all media and vectors in the tar."""
    modalities = task.modalities
    wanted = {
        extension
        for name, modality in modalities.items()
        if modality.kind != "text"
        for extension in modalities.extensions_of(name)
    }
    sums = set()
    with task.tar_path.open("rb") as tar:
        for member in find_members(task.tar_path):
            if member is not None and member.extension in wanted:
                tar.seek(member.data_block * BLOCK_BYTES)
                sums.add(hashlib.sha256(tar.read(member.num_bytes)).hexdigest())
    return sums


def describe_stranger(task: RepairTask, index: ShardIndex) -> str:
    """Describes the files of another dataset, and the recorded samples, which are lost."""
    is_known = task.row.parquet_sha256 is not None or _recorded_media(task) is not None
    keys = recorded_keys(task.parquet_path, task.row) if is_known else []
    lost = named_keys(keys) or f"; lost: {task.row.num_samples}"
    return (
        f"{task.tar_path}: its {index.num_samples} samples are not those that manifest.jsonl "
        "records for this shard: restore or recreate it; to continue without the recorded ones, "
        f"move {task.name}.tar, .idx and .parquet out of the folder and repair again{lost}"
    )


def describe_new_samples(task: RepairTask, on_disk: ManifestRow) -> str:
    """Describes a tar and an index that fit each other, but not the manifest."""
    keys = set(walk_tar(task.tar_path).keys)
    lost = [key for key in recorded_keys(task.parquet_path, task.row) if key not in keys]
    return (
        f"{task.tar_path}: its {on_disk.num_samples} samples take the place of the "
        f"{task.row.num_samples} that manifest.jsonl records, because tar and index fit each other"
        f"{named_keys(lost)}"
    )


def row_on_disk(task: RepairTask, index: ShardIndex | None) -> ManifestRow | None:
    """Returns the row to repair by: a tar and an index that match go before the manifest."""
    tar_sha256, row = sha256_of(task.tar_path), task.row
    fits_index = index is not None and index.tar_sha256 == tar_sha256
    if fits_index and (row is None or row.tar_sha256 != tar_sha256):
        return manifest_row(task.folder, task.name)
    return row
