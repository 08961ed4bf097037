"""Repair of a dataset, so that no sample is lost that stands anywhere in it.

1. metadata   manifest.jsonl and dataset.json are read; flipped bits are undone
2. plan       checksums say which file is which; misplaced files move to their places
3. shards     each shard is repaired from its own files (data_prep.verify.shard_repair)
4. closing    manifest.jsonl and dataset.json are written again if they differ from the shards

A replaced file whose content was not restored exactly is kept in the folder `damaged/`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.command import say
from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.folder import finish_dataset, lock_folder
from data_prep.shards.manifest import ManifestRow, fingerprint_of, manifest_row, read_dataset_files
from data_prep.storage.atomic import write_atomically
from data_prep.verify.damaged_files import DAMAGED_FOLDER, set_aside
from data_prep.verify.dataset_check import (
    PLAN_PATHS,
    DatasetOrigin,
    check_dataset,
    read_origin,
)
from data_prep.verify.metadata_repair import SavedMetadata, read_metadata
from data_prep.verify.repair_plan import RepairPlan, apply_plan, make_plan
from data_prep.verify.repair_task import RepairReport, read_index
from data_prep.verify.shard_repair import repair_shard
from data_prep.verify.surviving_shards import (
    modalities_of,
    origin_of,
    repair_tasks,
    shard_names,
    tar_folder_of,
)
from data_prep.workers import run_tasks

METADATA_FILES = ("manifest.jsonl", "dataset.json")


def repair_dataset(folder: Path, *, workers: int) -> None:
    """Rebuilds all files that can be rebuilt, and prints a list of repairs and lost samples.

    Raises:
        InputError: if manual work remains; everything else has then been repaired.
    """
    _check_is_folder(folder)
    with lock_folder(folder):
        report = _repair(folder, tar_base=folder, workers=workers)
    for line in report.done or ["nothing: all files are consistent"] * (not report.refused):
        say(f"repaired: {line}")
    alternative = ""
    is_lost = report.refused or any("lost: " in line for line in report.done)
    if is_lost and read_origin(folder).command == "make_shards":
        alternative = (
            "to restore lost samples, move the files of the affected shard away and run "
            "make_shards again with the same config: it recreates only this shard"
        )
    if report.refused:
        lines = "\n".join(f"  {line}" for line in report.refused)
        raise InputError(f"{folder}: could not be repaired completely:\n{lines}\n{alternative}")
    if alternative:
        say(alternative)


def print_repairs(folder: Path, *, workers: int) -> None:
    """Prints what `repair_dataset` would do, without changing anything.

    The repair runs in a temporary folder (TMPDIR) of links to the files; rewritten shards take
    space there.

    Raises:
        InputError: if manual work would remain.
    """
    _check_is_folder(folder)
    with tempfile.TemporaryDirectory(prefix="isopair-") as temporary:
        copy = Path(temporary) / "dataset"  # `folder.name` may be ".."
        for path in sorted(folder.rglob("*")):
            target = copy / path.relative_to(folder)
            if path.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                target.symlink_to(path.absolute())
        copy.mkdir(exist_ok=True)
        report = _repair(copy, tar_base=folder, workers=workers)
        done, refused = (
            [line.replace(str(copy), str(folder)) for line in lines]
            for lines in (report.done, report.refused)
        )
    for line in done or ["nothing: all files are consistent"] * (not refused):
        say(f"would repair: {line}")
    if refused:
        lines = "\n".join(f"  {line}" for line in refused)
        raise InputError(f"{folder}: would not be repaired completely:\n{lines}")


def _check_is_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a dataset folder (dataset), found none")


def _repair(folder: Path, *, tar_base: Path, workers: int) -> RepairReport:
    """Repairs a dataset.

    Args:
        folder: folder to read and write.
        tar_base: folder that the tar folder of dataset.json is relative to.
        workers: number of processes.
    """
    saved = read_metadata(folder)
    origin = origin_of(folder, saved)
    report = RepairReport(done=list(saved.notes))
    plan = make_plan(
        folder,
        saved.rows,
        unsealed=saved.unsealed,
        is_foreign=origin.is_foreign,
        workers=workers,
    )
    apply_plan(plan, folder=folder)
    report.done += _describe_plan(plan)
    rows = plan.rows
    tar_folder = tar_base / tar_folder_of(folder, origin) if origin.is_foreign else folder
    names = shard_names(folder, origin, rows, report, tar_folder=tar_folder)
    if unfinished := _describe_unfinished(folder, saved, num_shards=len(names)):
        report.refused.append(unfinished)
        return report
    modalities = modalities_of(folder, origin, saved.info, names)
    tasks = repair_tasks(
        folder,
        names,
        rows=rows,
        info=saved.info,
        origin=origin,
        modalities=modalities,
        tar_folder=tar_folder,
    )
    for found in run_tasks(repair_shard, tasks, workers=workers):
        report.done += found.done
        report.refused += found.refused
        report.is_undecided |= found.is_undecided
    report.done.sort()
    report.refused.sort()
    if not report.is_undecided:
        _close(folder, names, saved, origin, modalities=modalities, report=report)
    return report


def _describe_unfinished(folder: Path, saved: SavedMetadata, *, num_shards: int) -> str | None:
    """Describes a dataset without shards, or whose making was interrupted; otherwise None."""
    if not num_shards:
        return f"{folder}: contains no shard"
    planned = _planned(folder, "num_shards")
    if saved.info is not None or saved.rows or planned is None or num_shards >= planned:
        return None
    return (
        f"{folder}: expected {planned} shards (its plan), found {num_shards}, and neither "
        "dataset.json nor manifest.jsonl: finish the dataset by make_shards with the same config: "
        "it creates only missing shards"
    )


def _describe_plan(plan: RepairPlan) -> list[str]:
    return [
        *(
            f"manifest.jsonl: shard {new}: was recorded as {old}"
            for old, new in sorted(plan.renamed_rows.items())
        ),
        *(f"{move.target}: moved here from {move.source}" for move in plan.moves),
        *(f"{path}: is no recorded file: kept in {DAMAGED_FOLDER}/" for path in plan.displaced),
    ]


# ------------------------------------------------------------------------------------- closing


def _close(
    folder: Path,
    names: Sequence[str],
    saved: SavedMetadata,
    origin: DatasetOrigin,
    *,
    modalities: Modalities,
    report: RepairReport,
) -> None:
    """Writes manifest.jsonl and dataset.json again if they do not describe the shards."""
    if saved.is_info_sealed:
        _restore_plan(folder, origin.preparation, report)
    if not all(read_index(folder / f"{name}.idx") for name in names):
        return
    rows = [row for name in names if (row := manifest_row(folder, name)).num_samples]
    if _is_closed(folder, rows):
        return
    _set_aside_metadata(folder, saved, rows)
    info = saved.info
    new = finish_dataset(
        folder,
        names,
        media=modalities.media[0] if modalities.is_pair else "",
        modalities=modalities,
        labels=info.labels if info else _planned_labels(origin),
        preparation=origin.preparation,
        num_pairs=info.num_pairs if info else _planned(folder, "num_pairs"),
        tar_folder=origin.tar_folder or ".",
        isopair_version=info.isopair_version if info else None,
    )
    report.done.append(f"{folder}: rebuilt manifest.jsonl and dataset.json")
    if info is None and not origin.preparation:
        report.done.append(
            f"{folder}: dataset.json was unreadable, and there is no plan: lost are the "
            "preparation and the number of pairs"
        )
    if info is not None and saved.seal_problem is not None:
        report.done.append(
            f"{folder}: dataset.json was edited or damaged: kept as found are num_pairs "
            f"{info.num_pairs}, isopair_version {info.isopair_version}, tar_folder "
            f"{info.tar_folder}" + (", preparation" if origin.planned is None else "")
        )
    if info is not None and info.fingerprint != new.fingerprint:
        report.done.append(
            f"{folder}: contains different samples than before ({new.num_samples:,}): existing "
            "subsets, embeddings and runs no longer match it"
        )


def _is_closed(folder: Path, rows: Sequence[ManifestRow]) -> bool:
    """Returns True if dataset.json and manifest.jsonl exist and agree with the shards."""
    try:
        info, manifest = read_dataset_files(folder)
    except InputError:
        return False
    findings = check_dataset(folder, info, manifest, origin=read_origin(folder))
    return manifest == rows and all(finding.kind != "totals" for finding in findings)


def _set_aside_metadata(folder: Path, saved: SavedMetadata, rows: Sequence[ManifestRow]) -> None:
    """Keeps the files that are replaced, unless they are readable and record the same shards."""
    recorded = {fingerprint_of(sorted(saved.rows.values(), key=lambda row: row.name))}
    if saved.info is not None:
        recorded.add(saved.info.fingerprint)
    are_equal = fingerprint_of(rows) in recorded
    for path in (folder / name for name in METADATA_FILES):
        if path.is_file() and (path in saved.unreadable or not are_equal):
            set_aside(path, folder=folder)


def _planned_labels(origin: DatasetOrigin) -> list[str]:
    """Returns the names of the labels in the settings of make_shards or index_shards."""
    columns = origin.config.get("columns", {})
    return list(columns.get("labels", ()) or origin.config.get("labels", ()))


def _planned(folder: Path, key: str) -> int | None:
    """Returns a number in the plan of make_shards; None if unknown."""
    try:
        found = json.loads((folder / PLAN_PATHS[1]).read_bytes())["items"][key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, int) else None


def _restore_plan(folder: Path, preparation: dict[str, Any], report: RepairReport) -> None:
    """Writes the record of dataset.json, whose seal is valid, into a plan that differs."""
    for path in (folder / name for name in PLAN_PATHS):
        try:
            plan = json.loads(path.read_bytes())
            is_equal = plan["made_from"] == preparation
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if not is_equal and preparation:
            content = json.dumps(plan | {"made_from": preparation}, indent=2).encode() + b"\n"
            write_atomically(path, content)
            report.done.append(f"{path}: restored the settings from dataset.json")
