"""Repair of a dataset: first each shard separately, then manifest.jsonl and dataset.json."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.command import say
from data_prep.errors import InputError
from data_prep.shards.columns import KeptType
from data_prep.shards.folder import finish_dataset, lock_folder
from data_prep.shards.manifest import (
    DatasetInfo,
    ManifestRow,
    manifest_row,
    parse_info,
    parse_manifest,
    read_dataset_files,
)
from data_prep.shards.parquet import kept_types_of, read_shard_parquet
from data_prep.shards.sample import media_kind_of
from data_prep.shards.tar_index import IndexTask
from data_prep.storage.atomic import sha256_of
from data_prep.verify.dataset_check import (
    DatasetOrigin,
    check_dataset,
    expects_parquet,
    read_origin,
    shard_names_on_disk,
    sort_shards,
    totals_of_indexes,
)
from data_prep.verify.shard_repair import RepairReport, RepairTask, read_index, repair_shard
from data_prep.workers import run_tasks

log = logging.getLogger(__name__)


def repair_dataset(folder: Path, *, workers: int) -> None:
    """Rebuilds all files that can be rebuilt, and prints a list of repairs and lost samples.

    Raises:
        InputError: if manual work remains; everything else has then been repaired.
    """
    if not folder.is_dir():
        raise InputError(f"{folder}: expected a dataset folder (dataset), found none")
    with lock_folder(folder):
        report = _repair(folder, workers=workers)
    for line in report.done or ["nothing: all files are consistent"] * (not report.refused):
        say(f"repaired: {line}")
    alternative = ""
    if read_origin(folder).command == "make_shards" and (report.done or report.refused):
        alternative = (
            "to restore lost samples, delete the files of the affected shard and run make_shards "
            "again with the same config: it recreates only this shard"
        )
    if report.refused:
        lines = "\n".join(f"  {line}" for line in report.refused)
        raise InputError(f"{folder}: could not be repaired completely:\n{lines}\n{alternative}")
    if alternative:
        say(alternative)


def _repair(folder: Path, *, workers: int) -> RepairReport:
    origin, info = read_origin(folder), _read_info(folder)
    rows = _read_rows(folder)
    report = RepairReport()
    names = _shard_names(folder, origin, rows, report)
    if not names:
        report.refused.append(f"{folder}: contains no shard")
        return report
    media = _media_kind(folder, origin, info, names)
    tar_folder = _tar_folder(folder, origin)
    tasks = _tasks(
        folder, names, rows=rows, info=info, origin=origin, media=media, tar_folder=tar_folder
    )
    for found in run_tasks(repair_shard, tasks, workers=workers):
        report.done += found.done
        report.refused += found.refused
    report.done.sort()
    report.refused.sort()
    if not _is_closed(folder, names) and all(read_index(folder / f"{name}.idx") for name in names):
        old = info.fingerprint if info else None
        new = finish_dataset(
            folder,
            names,
            media=media,
            preparation=origin.preparation,
            num_pairs=info.num_pairs if info else None,
            tar_folder=tar_folder,
        )
        report.done.append(f"{folder}: rebuilt manifest.jsonl and dataset.json")
        if old not in (None, new.fingerprint):
            report.done.append(
                f"{folder}: contains different samples than before ({new.num_samples:,}): existing "
                "subsets, embeddings and runs no longer match it"
            )
    return report


def _is_closed(folder: Path, names: Sequence[str]) -> bool:
    """Returns True if dataset.json and manifest.jsonl exist and agree with the indexes."""
    try:
        info, manifest = read_dataset_files(folder)
        rows = [manifest_row(folder, name) for name in names]
    except InputError:
        return False
    findings = check_dataset(folder, info, manifest, origin=read_origin(folder))
    is_as_indexed = manifest == [row for row in rows if row.num_samples]
    return is_as_indexed and all(finding.kind != "totals" for finding in findings)


# ------------------------------------------------------------------------- remaining metadata


def _read_info(folder: Path) -> DatasetInfo | None:
    path = folder / "dataset.json"
    try:
        return parse_info(path.read_bytes(), path)
    except (OSError, InputError):
        return None


def _read_rows(folder: Path) -> dict[str, ManifestRow]:
    """Reads the manifest rows by name; damaged lines are skipped."""
    path = folder / "manifest.jsonl"
    rows: dict[str, ManifestRow] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            found = parse_manifest(line, path)
        except InputError as error:
            log.warning("%s", error)
            continue
        rows |= {row.name: row for row in found}
    return rows


def _shard_names(
    folder: Path, origin: DatasetOrigin, rows: Mapping[str, ManifestRow], report: RepairReport
) -> list[str]:
    """Returns the shards of the repaired dataset."""
    indexed = shard_names_on_disk(folder, "*.idx")
    tar_folder = folder / _tar_folder(folder, origin)
    listed = {name for name in rows if (tar_folder / f"{name}.tar").is_file()}
    for name in sort_shards(rows.keys() - indexed - listed):
        report.done.append(
            f"{folder / name}: tar and index are missing; removed its "
            f"{rows[name].num_samples} samples from the dataset"
        )
    if rows:
        indexed -= _copies(folder, indexed - rows.keys(), rows, report)
    unlisted = set()
    if not origin.is_foreign:
        unlisted = shard_names_on_disk(folder, "*.tar") - shard_names_on_disk(folder, "*.idx")
        unlisted -= listed
    if rows and unlisted:
        report.refused += [
            f"{folder / name}.tar: neither listed nor indexed: delete it if it does not belong to "
            "this dataset; otherwise, delete manifest.jsonl and repair again"
            for name in sort_shards(unlisted)
        ]
        unlisted = set()
    return sort_shards(indexed | listed | unlisted)


def _copies(
    folder: Path, unlisted: set[str], rows: Mapping[str, ManifestRow], report: RepairReport
) -> set[str]:
    """Returns the unlisted shards that are copies of listed ones."""
    names = {row.tar_sha256: row.name for row in rows.values()}
    copies = set()
    for name in sort_shards(unlisted):
        index = read_index(folder / f"{name}.idx")
        if index is not None and index.tar_sha256 in names:
            copies.add(name)
            original = names[index.tar_sha256]
            report.refused.append(
                f"{folder / name}: duplicate of shard {original}: delete its files"
            )
        elif index is None or index.num_samples:
            report.done.append(f"{folder / name}: added to manifest.jsonl")
    return copies


def _media_kind(
    folder: Path, origin: DatasetOrigin, info: DatasetInfo | None, names: Sequence[str]
) -> str:
    if "media" in origin.config:
        return origin.config["media"]
    if info is not None:
        return info.media
    for name in names:
        index = read_index(folder / f"{name}.idx")
        kinds = {media_kind_of(extension) for extension in index.fields} if index else set()
        kinds.discard(None)
        if len(kinds) == 1:
            return kinds.pop()
    raise InputError(
        f"{folder}: expected the kind of media (image or audio) in dataset.json, the plan or an "
        "index, found none; restore dataset.json"
    )


def _tar_folder(folder: Path, origin: DatasetOrigin) -> str:
    if origin.tar_folder is not None:
        return origin.tar_folder
    if origin.command == "index_shards":
        raise InputError(
            f"{folder / 'dataset.json'}: unreadable, so that the tar folder is unknown; run "
            "python -m data_prep.index_shards again with the same config: it keeps the indexes"
        )
    return "."


def _tasks(
    folder: Path,
    names: Sequence[str],
    *,
    rows: Mapping[str, ManifestRow],
    info: DatasetInfo | None,
    origin: DatasetOrigin,
    media: str,
    tar_folder: str,
) -> list[RepairTask]:
    has_parquet = expects_parquet(folder, origin, names)
    kept = _kept_types(folder, names, media) if has_parquet else {}
    counts = _missing_counts(folder, names, rows=rows, info=info)
    return [
        RepairTask(
            folder=folder,
            tar_folder=folder / tar_folder,
            name=name,
            row=rows.get(name),
            media_kind=media,
            has_parquet=has_parquet,
            kept=kept,
            foreign=IndexTask(
                tar_path=folder / tar_folder / f"{name}.tar",
                index_path=folder / f"{name}.idx",
                name=name,
                media_kind=media,
                skip_incomplete=origin.config.get("skip_incomplete", False),
                measure=has_parquet,
                kept=kept,
            )
            if origin.is_foreign
            else None,
            counts=counts,
        )
        for name in names
    ]


def _kept_types(folder: Path, names: Sequence[str], media: str) -> dict[str, KeptType]:
    """Returns the types of kept columns, from the first readable Parquet file."""
    for name in names:
        try:
            table = read_shard_parquet(folder / f"{name}.parquet")
        except InputError:
            continue
        return kept_types_of(table.schema, media)
    return {}


def _missing_counts(
    folder: Path, names: Sequence[str], *, rows: Mapping[str, ManifestRow], info: DatasetInfo | None
) -> tuple[dict[str, int], dict[str, int]] | None:
    """Computes `rejected` and `marked` of a lost index: the totals minus all other indexes.

    Returns None unless exactly one index is lost.
    """
    intact = [name for name in names if _is_as_recorded(folder / f"{name}.idx", rows.get(name))]
    if info is None or len(names) - len(intact) != 1:
        return None
    others = totals_of_indexes(folder, intact, listed=set(intact)) or {}
    rejected, marked = (
        dict(Counter(getattr(info, counts)) - Counter(others[counts]))
        for counts in ("rejected", "marked")
    )
    return rejected, marked


def _is_as_recorded(path: Path, row: ManifestRow | None) -> bool:
    """Returns True if an index is valid and matches its manifest row, if there is one."""
    if row is None:
        return read_index(path) is not None
    return path.is_file() and sha256_of(path) == row.index_sha256
