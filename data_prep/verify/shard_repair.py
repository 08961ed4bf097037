"""Repair of a shard from its own files.

1. A damaged or unordered tar is rewritten with the samples that can be recovered.
2. An index that does not match the tar is rebuilt from it.
3. Rows of lost samples are removed from the Parquet file, and missing rows are measured again.

Files are replaced atomically, in the order tar, index, Parquet file, so that an interrupted repair
can be repeated. Foreign tars, which were not written by make_shards, are never changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError
from data_prep.shards.columns import KeptType, own_columns
from data_prep.shards.index import ShardIndex
from data_prep.shards.manifest import (
    ManifestRow,
    manifest_row,
)
from data_prep.shards.parquet import (
    RepairedRows,
    read_shard_parquet,
    write_shard_parquet,
)
from data_prep.shards.tar_index import IndexTask, TarTable, index_tar, read_tar_samples
from data_prep.shards.writer import ShardWriter
from data_prep.storage.atomic import (
    sha256_of,
    write_atomically,
)
from data_prep.verify.indexed_tar import walk_tar
from data_prep.verify.shard_check import Finding, ShardCheck, verify_shard
from data_prep.verify.shard_salvage import SavedSamples, save_by_headers, save_by_index

if TYPE_CHECKING:
    import pyarrow

KEYS_NAMED = 5
DAMAGED = "damaged"  # reason under which an index counts lost samples


@dataclass(frozen=True)
class RepairTask:
    """A worker's task: the shard to repair."""

    folder: Path
    tar_folder: Path
    name: str
    row: ManifestRow | None  # None: not listed by manifest.jsonl, or unreadable
    media_kind: str
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


def repair_shard(task: RepairTask) -> RepairReport:
    """Makes the files of a shard consistent, and reports repairs and lost samples."""
    report = RepairReport()
    if not task.tar_path.is_file():
        report.refused.append(
            f"{task.tar_path}: missing: restore or recreate it; to continue without its samples, "
            f"delete {task.index_path.name} and repair again"
        )
        return report
    index = read_index(task.index_path)
    kinds = {finding.kind for finding in _findings(task, index)}
    if "tar" in kinds:
        if task.foreign is not None:
            report.refused.append(
                f"{task.tar_path}: damaged, but not written by make_shards and therefore never "
                "rewritten: restore it, or delete its .idx and index the dataset again with "
                "python -m data_prep.index_shards"
            )
        else:
            _rewrite(task, index, report)
        return report
    if task.foreign is not None and kinds & {"index", "parquet"}:
        problems = index_tar(task.foreign)
        report.refused += problems
        report.done += [] if problems else [f"{task.index_path}: rebuilt from the tar"]
        return report
    if "index" in kinds:
        _rebuild_index(task, index, report)
        kinds = {finding.kind for finding in _findings(task, read_index(task.index_path))}
    if "parquet" in kinds:
        _repair_parquet(task, report)
    return report


def read_index(path: Path) -> ShardIndex | None:
    """Returns the index, or None if it is missing or damaged."""
    try:
        return ShardIndex.read(path)
    except InputError:
        return None


def _findings(task: RepairTask, index: ShardIndex | None) -> list[Finding]:
    """Verifies the shard; a tar and an index that match take precedence over the manifest."""
    tar_sha256 = sha256_of(task.tar_path)
    row = task.row
    fits_index = index is not None and index.tar_sha256 == tar_sha256
    if fits_index and (row is None or row.tar_sha256 != tar_sha256):
        row = manifest_row(task.folder, task.name)
    if row is None:  # no record matches the tar
        kind = "tar" if task.foreign is None or walk_tar(task.tar_path).problems else "index"
        return [Finding(f"{task.index_path}: matches no tar", kind)]
    check = ShardCheck(
        folder=task.folder,
        tar_folder=task.tar_folder,
        row=row,
        media_kind=task.media_kind,
        decode=False,
        has_parquet=task.has_parquet,
        is_foreign=task.foreign is not None,
    )
    return verify_shard(check)


# --------------------------------------------------------------------------------------- index


def _rebuild_index(task: RepairTask, old: ShardIndex | None, report: RepairReport) -> None:
    table = TarTable()
    for found in read_tar_samples(task.tar_path):
        table.add(found)
    counts = [task.counts, ({}, {})]
    if old is not None and old.tar_sha256 == sha256_of(task.tar_path):
        counts.insert(0, (old.rejected, old.marked))
    candidates = [
        table.to_index(task.tar_path, rejected=each[0], marked=each[1]).to_bytes()
        for each in counts
        if each is not None
    ]
    recorded = task.row.index_sha256 if task.row else None
    exact = [each for each in candidates if hashlib.sha256(each).hexdigest() == recorded]
    write_atomically(task.index_path, (exact or candidates)[0])
    how = (
        "identical to the index that manifest.jsonl records"
        if exact
        else "but its counts of rejected pairs may differ from before"
    )
    report.done.append(f"{task.index_path}: rebuilt from the tar, {how}")


# ----------------------------------------------------------------------------------------- tar


def _rewrite(task: RepairTask, index: ShardIndex | None, report: RepairReport) -> None:
    table = _read_table(task)
    if index is not None and task.row is not None:
        known = (task.row.tar_sha256, sha256_of(task.tar_path))
        index = index if index.tar_sha256 in known else None
    saved = _save(task, index, table)
    if not saved.members:
        report.refused.append(
            f"{task.tar_path}: none of its samples can be recovered: restore or recreate it; to "
            "continue without them, delete it with its .idx and repair again"
        )
        return
    num_lost = _num_lost(task, index, saved)
    repaired_rows = RepairedRows(table, media_kind=task.media_kind, kept=task.kept)
    _write(task, index, saved, repaired_rows=repaired_rows, num_lost=num_lost)
    compared = "checked against headers and Parquet" if table else "checked against headers only"
    how = "all match the CRC32 of the old index" if index else compared
    text = f"{task.tar_path}: rewritten with {len(saved.members)} samples ({how})"
    if num_lost:
        named = ", ".join(saved.lost[:KEYS_NAMED])
        more = ", ..." if num_lost > KEYS_NAMED else ""
        text += f"; lost: {num_lost}: {named}{more}"
    report.done.append(text)
    _report_measured(task, repaired_rows, report)


def _save(task: RepairTask, index: ShardIndex | None, table: pyarrow.Table | None) -> SavedSamples:
    rows = [] if table is None else table.select(["key", "sha256", "captions"]).to_pylist()
    if index is None:
        recorded = {row["key"]: (row["sha256"], row["captions"]) for row in rows}
        return save_by_headers(task.tar_path, media_kind=task.media_kind, recorded=recorded)
    num_rows = Counter(row["sha256"] for row in rows)
    keys_of_media = {row["sha256"]: row["key"] for row in rows if num_rows[row["sha256"]] == 1}
    recorded_sha256 = task.row.index_sha256 if task.row else None
    return save_by_index(
        task.tar_path,
        index,
        is_as_recorded=sha256_of(task.index_path) == recorded_sha256,
        keys_of_media=keys_of_media,
    )


def _num_lost(task: RepairTask, index: ShardIndex | None, saved: SavedSamples) -> int:
    if index is None and task.row is not None:
        return max(task.row.num_samples - len(saved.members), 0)
    return len(saved.lost)


def _write(
    task: RepairTask,
    index: ShardIndex | None,
    saved: SavedSamples,
    *,
    repaired_rows: RepairedRows,
    num_lost: int,
) -> None:
    rejected, marked = task.counts or ({}, {})
    if index is not None:
        rejected, marked = index.rejected, index.marked
    rejected = dict(Counter(rejected) + Counter({DAMAGED: num_lost}))
    writer = ShardWriter(task.folder, task.name)
    try:
        for sample in saved.read(task.tar_path):
            writer.add(sample.key, members=sample.members)
            if task.has_parquet:
                repaired_rows.add(sample)
        marked = repaired_rows.count_tags() if task.has_parquet else marked
        writer.finish(rejected=rejected, marked=marked)
    except BaseException:
        writer.discard()
        raise
    # Written after the tar, because a second attempt needs the old rows to detect damaged media.
    if task.has_parquet:
        write_shard_parquet(task.parquet_path, repaired_rows.to_table())


# ------------------------------------------------------------------------------------- Parquet


def _read_table(task: RepairTask) -> pyarrow.Table | None:
    """Reads the shard's Parquet file; None unless it has all built-in columns."""
    if not task.has_parquet:
        return None
    try:
        table = read_shard_parquet(task.parquet_path)
    except InputError:
        return None
    return table if own_columns(task.media_kind) <= set(table.column_names) else None


def _repair_parquet(task: RepairTask, report: RepairReport) -> None:
    repaired_rows = RepairedRows(_read_table(task), media_kind=task.media_kind, kept=task.kept)
    for found in read_tar_samples(task.tar_path):
        repaired_rows.add(found.sample)
    write_shard_parquet(task.parquet_path, repaired_rows.to_table())
    report.done.append(f"{task.parquet_path}: matched to the tar: {len(repaired_rows.rows)} rows")
    _report_measured(task, repaired_rows, report)


def _report_measured(task: RepairTask, repaired_rows: RepairedRows, report: RepairReport) -> None:
    if repaired_rows.num_measured:
        report.done.append(
            f"{task.parquet_path}: measured {repaired_rows.num_measured} rows again; they lack the "
            "columns that only make_shards can fill: source, language, marks and kept columns"
        )
