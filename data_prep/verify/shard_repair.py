"""Repair of a shard from its own files.

1. A damaged Parquet file is restored byte for byte, if possible.
2. A damaged or unordered tar is rewritten with the samples that can be recovered.
3. An index that does not match the tar is rebuilt from it.
4. Rows of lost samples are removed from the Parquet file, and missing rows are measured again.

Files are replaced atomically, in the order tar, index, Parquet file, so that an interrupted repair
can be repeated. A file whose content was not restored exactly is kept in `damaged/`. Foreign tars,
which were not written by make_shards, are never changed.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError
from data_prep.shards.columns import built_in_columns
from data_prep.shards.index import ShardIndex
from data_prep.shards.manifest import (
    ManifestRow,
)
from data_prep.shards.parquet import (
    RepairedRows,
    check_parquet_sum,
    checksum_columns,
    parquet_bytes,
    read_shard_parquet,
    signature_in,
    write_shard_parquet,
)
from data_prep.shards.sample_contents import contents_of
from data_prep.shards.tar_index import TarTable, index_tar, read_tar_samples
from data_prep.shards.writer import ShardWriter
from data_prep.storage.atomic import (
    sha256_of,
    write_atomically,
)
from data_prep.verify.bit_flips import MAX_BYTES, undo_flip_by_sum
from data_prep.verify.damaged_files import remove_if_empty, set_aside
from data_prep.verify.indexed_tar import walk_tar
from data_prep.verify.repair_task import (
    DAMAGED,
    RepairReport,
    RepairTask,
    describe_new_samples,
    describe_stranger,
    is_of_another_dataset,
    named_keys,
    read_index,
    recorded_keys,
    row_on_disk,
)
from data_prep.verify.shard_check import Finding, ShardCheck, verify_shard
from data_prep.verify.shard_salvage import SavedSamples, save_by_headers, save_by_index

if TYPE_CHECKING:
    import pyarrow


def repair_shard(task: RepairTask) -> RepairReport:
    """Makes the files of a shard consistent, and reports repairs and lost samples."""
    report = RepairReport()
    if not task.tar_path.is_file():
        keys = [] if task.row is None else recorded_keys(task.parquet_path, task.row)
        report.refused.append(
            f"{task.tar_path}: missing: restore or recreate it; to continue without its samples, "
            f"delete {task.index_path.name} and repair again{named_keys(keys)}"
        )
        return report
    _restore_parquet(task, report)
    index = read_index(task.index_path)
    if index is not None and task.foreign is None and is_of_another_dataset(task, index):
        report.refused.append(describe_stranger(task, index))
        report.is_undecided = True
        return report
    on_disk = row_on_disk(task, index)
    if None not in (task.row, on_disk) and on_disk.tar_sha256 != task.row.tar_sha256:
        report.done.append(describe_new_samples(task, on_disk))
    task = replace(task, row=on_disk)
    kinds = {finding.kind for finding in _findings(task, index)}
    if task.foreign is not None:
        _repair_foreign(task, kinds, report)
        return report
    if "tar" in kinds:
        _rewrite(task, index, report)
        return report
    if "index" in kinds:
        _rebuild_index(task, index, report)
        kinds = {finding.kind for finding in _findings(task, read_index(task.index_path))}
    if "parquet" in kinds:
        _repair_parquet(task, report)
    return report


def _repair_foreign(task: RepairTask, kinds: set[str], report: RepairReport) -> None:
    """Indexes a tar again that make_shards did not write."""
    if "tar" in kinds:
        report.refused.append(
            f"{task.tar_path}: damaged, but not written by make_shards and therefore never "
            "rewritten: restore it, or delete its .idx and index the dataset again with "
            "python -m data_prep.index_shards"
        )
    elif kinds & {"index", "parquet"}:
        for path in (task.index_path, task.parquet_path):
            if path.is_file():
                set_aside(path, folder=task.folder)
        problems = index_tar(task.foreign)
        report.refused += problems
        report.done += [] if problems else [f"{task.index_path}: rebuilt from the tar"]


def _findings(task: RepairTask, index: ShardIndex | None) -> list[Finding]:
    row = task.row
    if row is None:  # no record matches the tar
        kind = "tar" if task.foreign is None or walk_tar(task.tar_path).problems else "index"
        return [Finding(f"{task.index_path}: matches no tar", kind)]
    check = ShardCheck(
        folder=task.folder,
        tar_folder=task.tar_folder,
        row=row,
        modalities=task.modalities,
        decode=False,
        has_parquet=task.has_parquet,
        is_foreign=task.foreign is not None,
    )
    return verify_shard(check)


# --------------------------------------------------------------------------------------- index


def _rebuild_index(task: RepairTask, old: ShardIndex | None, report: RepairReport) -> None:
    table = TarTable(task.modalities)
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
    if not exact and task.index_path.is_file():
        set_aside(task.index_path, folder=task.folder)
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
        lost = named_keys(saved.lost) or (
            named_keys(recorded_keys(task.parquet_path, task.row)) if task.row is not None else ""
        )
        report.refused.append(
            f"{task.tar_path}: holds none of the samples of its index: restore or recreate it; to "
            f"continue without them, move {task.name}.tar and .idx out of the folder and repair "
            f"again{lost}"
        )
        report.is_undecided = task.row is None  # no record says which of the two is right
        return
    num_lost = _num_lost(task, index, saved)
    repaired_rows = RepairedRows(table, modalities=task.modalities, kept=task.kept)
    kept = _set_aside_old(task) if num_lost or index is None else []
    # After an error these files stay in `damaged/`: the tar may have been replaced already.
    _write(task, index, saved, repaired_rows=repaired_rows, num_lost=num_lost)
    if task.row is not None and sha256_of(task.tar_path) == task.row.tar_sha256:
        _forget(kept, folder=task.folder)
        kept = []
    compared = "checked against headers and Parquet" if table else "checked against headers only"
    how = "all match the CRC32 of the old index" if index else compared
    text = f"{task.tar_path}: rewritten with {len(saved.members)} samples ({how})"
    if num_lost:
        text += named_keys(saved.lost) or f"; lost: {num_lost}"
    report.done.append(text + (f"; the old files are kept in {kept[0].parent}" if kept else ""))
    _report_measured(task, repaired_rows, report)


def _set_aside_old(task: RepairTask) -> list[Path]:
    paths = (task.tar_path, task.parquet_path)
    return [set_aside(path, folder=task.folder) for path in paths if path.is_file()]


def _forget(kept: list[Path], *, folder: Path) -> None:
    """Removes files from `damaged/` that are not needed there."""
    for path in kept:
        path.unlink(missing_ok=True)
    remove_if_empty(folder)


def _save(task: RepairTask, index: ShardIndex | None, table: pyarrow.Table | None) -> SavedSamples:
    rows = [] if table is None else table.to_pylist()
    if index is None:
        recorded = {row["key"]: signature_in(row, task.modalities) for row in rows}
        return save_by_headers(task.tar_path, modalities=task.modalities, recorded=recorded)
    checksums = [
        (row[column], row["key"]) for column in checksum_columns(task.modalities) for row in rows
    ]
    num_rows = Counter(sha256 for sha256, _ in checksums)
    keys_of_media = {sha256: key for sha256, key in checksums if sha256 and num_rows[sha256] == 1}
    recorded_sha256 = task.row.index_sha256 if task.row else None
    return save_by_index(
        task.tar_path,
        index,
        is_as_recorded=sha256_of(task.index_path) == recorded_sha256,
        keys_of_media=keys_of_media,
        recorded_keys=[row["key"] for row in rows] if len(rows) == index.num_samples else [],
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
    modalities = task.modalities
    writer = ShardWriter(task.folder, task.name, modalities=modalities)
    try:
        for sample in saved.read(task.tar_path):
            contents = None if modalities.is_pair else contents_of(sample, modalities)
            writer.add(sample.key, members=sample.members, contents=contents)
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
        if task.row is not None:
            check_parquet_sum(task.parquet_path, task.row)
        table = read_shard_parquet(task.parquet_path)
    except InputError:
        return None
    return table if built_in_columns(task.modalities) <= set(table.column_names) else None


def _restore_parquet(task: RepairTask, report: RepairReport) -> None:
    """Restores the recorded bytes of a damaged Parquet file, if they follow from its content."""
    row, path = task.row, task.parquet_path
    if row is None or row.parquet_sha256 is None or not path.is_file():
        return
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() == row.parquet_sha256:
        return
    restored = _recorded_bytes(path, content, row)
    if restored is not None:
        write_atomically(path, restored)
        report.done.append(f"{path}: restored, identical to the file that manifest.jsonl records")


def _recorded_bytes(path: Path, content: bytes, row: ManifestRow) -> bytes | None:
    sha256 = row.parquet_sha256
    footer_bytes = int.from_bytes(content[-8:-4], "little")
    # Pages have checksums of their own; a flipped bit elsewhere is in the footer or its length.
    start = max(len(content) - footer_bytes - 8, len(content) - MAX_BYTES, 0)
    try:
        written_again = parquet_bytes(read_shard_parquet(path))
    except InputError:
        written_again = b""
    if hashlib.sha256(written_again).hexdigest() == sha256:
        return written_again
    if len(content) != row.parquet_bytes:
        return None
    return undo_flip_by_sum(content, sha256, start=start)


def _repair_parquet(task: RepairTask, report: RepairReport) -> None:
    repaired_rows = RepairedRows(_read_table(task), modalities=task.modalities, kept=task.kept)
    for found in read_tar_samples(task.tar_path):
        repaired_rows.add(found.sample)
    if task.parquet_path.is_file():
        set_aside(task.parquet_path, folder=task.folder)
    write_shard_parquet(task.parquet_path, repaired_rows.to_table())
    report.done.append(f"{task.parquet_path}: matched to the tar: {len(repaired_rows.rows)} rows")
    _report_measured(task, repaired_rows, report)


def _report_measured(task: RepairTask, repaired_rows: RepairedRows, report: RepairReport) -> None:
    if repaired_rows.num_measured:
        report.done.append(
            f"{task.parquet_path}: measured {repaired_rows.num_measured} rows again; they lack the "
            "columns that only make_shards can fill: source, language, marks and kept columns"
        )
