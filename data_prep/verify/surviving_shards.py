"""The shards of a repaired dataset, and the task of each, from what can still be read of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.columns import KeptType
from data_prep.shards.manifest import DatasetInfo, ManifestRow
from data_prep.shards.parquet import check_parquet_sum, kept_types_of, read_shard_parquet
from data_prep.shards.sample import media_kind_of
from data_prep.shards.tar_index import IndexTask
from data_prep.storage.atomic import sha256_of
from data_prep.verify.dataset_check import (
    DatasetOrigin,
    expects_parquet,
    read_origin,
    shard_names_on_disk,
    sort_shards,
    totals_of_indexes,
)
from data_prep.verify.metadata_repair import SavedMetadata
from data_prep.verify.repair_task import (
    RepairReport,
    RepairTask,
    named_keys,
    read_index,
    recorded_keys,
)


def origin_of(folder: Path, saved: SavedMetadata) -> DatasetOrigin:
    """Returns the origin; a plan takes precedence over a dataset.json without a valid seal."""
    planned = read_origin(folder).planned
    if saved.info is None:
        return DatasetOrigin(planned or {}, planned=planned, tar_folder=None)
    recorded = saved.info.preparation
    preparation = recorded or planned if saved.is_info_sealed else planned or recorded
    return DatasetOrigin(preparation or {}, planned=planned, tar_folder=saved.info.tar_folder)


def shard_names(
    folder: Path,
    origin: DatasetOrigin,
    rows: Mapping[str, ManifestRow],
    report: RepairReport,
    *,
    tar_folder: Path,
) -> list[str]:
    """Returns the shards of the repaired dataset."""
    indexed = shard_names_on_disk(folder, "*.idx")
    listed = {name for name in rows if (tar_folder / f"{name}.tar").is_file()}
    for name in sort_shards(rows.keys() - indexed - listed):
        keys = recorded_keys(folder / f"{name}.parquet", rows[name])
        num_lost = rows[name].num_samples
        report.done.append(
            f"{folder / name}: tar and index are missing; removed its {num_lost} samples from the "
            f"dataset{named_keys(keys) or f'; lost: {num_lost}'}"
        )
    if rows:
        indexed -= _copies(folder, indexed - rows.keys(), rows, report, tar_folder=tar_folder)
    unlisted = set()
    if not origin.is_foreign:
        unlisted = shard_names_on_disk(folder, "*.tar") - shard_names_on_disk(folder, "*.idx")
        unlisted -= listed
    if rows and unlisted:
        sums = {row.tar_sha256: name for name, row in rows.items() if name in listed}
        for name in sort_shards(unlisted):
            original = sums.get(sha256_of(folder / f"{name}.tar"))
            report.refused.append(
                f"{folder / name}.tar: has the bytes of shard {original}: move it out of the folder"
                if original is not None
                else f"{folder / name}.tar: neither listed nor indexed: move it out of the folder "
                "if it does not belong to this dataset; otherwise, move manifest.jsonl out of the "
                "folder and repair again"
            )
        unlisted = set()
    return sort_shards(indexed | listed | unlisted)


def _copies(
    folder: Path,
    unlisted: set[str],
    rows: Mapping[str, ManifestRow],
    report: RepairReport,
    *,
    tar_folder: Path,
) -> set[str]:
    """Returns the unlisted shards whose index is that of a listed shard."""
    names = {row.tar_sha256: row.name for row in rows.values()}
    copies = set()
    for name in sort_shards(unlisted):
        index = read_index(folder / f"{name}.idx")
        if index is not None and index.tar_sha256 in names:
            copies.add(name)
            original = names[index.tar_sha256]
            report.refused.append(
                f"{folder / name}: has the index of shard {original}: move its files out of the "
                "folder"
            )
        elif (tar_folder / f"{name}.tar").is_file() and (index is None or index.num_samples):
            report.done.append(f"{folder / name}: added to manifest.jsonl")
    return copies


def modalities_of(
    folder: Path, origin: DatasetOrigin, info: DatasetInfo | None, names: Sequence[str]
) -> Modalities:
    """Returns the modalities of a dataset, from its settings, dataset.json or an index.

    Raises:
        InputError: if no file tells them.
    """
    if origin.config.get("media"):
        return Modalities.pair(origin.config["media"])
    if info is not None:
        return info.named_modalities()
    for name in names:
        index = read_index(folder / f"{name}.idx")
        if index is not None and index.modalities is not None:
            return index.modalities
        kinds = {media_kind_of(extension) for extension in index.fields} if index else set()
        kinds.discard(None)
        if len(kinds) == 1:
            return Modalities.pair(kinds.pop())
    raise InputError(
        f"{folder}: expected the kind of media (image or audio) or the modalities in dataset.json, "
        "the plan or an index, found none; restore dataset.json"
    )


def tar_folder_of(folder: Path, origin: DatasetOrigin) -> str:
    """Returns the folder of the tars, relative to the dataset folder.

    Raises:
        InputError: if only the unreadable dataset.json of index_shards records it.
    """
    if origin.tar_folder is not None:
        return origin.tar_folder
    if origin.command == "index_shards":
        raise InputError(
            f"{folder / 'dataset.json'}: unreadable, so that the tar folder is unknown; run "
            "python -m data_prep.index_shards again with the same config: it keeps the indexes"
        )
    return "."


def repair_tasks(
    folder: Path,
    names: Sequence[str],
    *,
    rows: Mapping[str, ManifestRow],
    info: DatasetInfo | None,
    origin: DatasetOrigin,
    modalities: Modalities,
    tar_folder: Path,
) -> list[RepairTask]:
    """Builds the task of each shard."""
    has_parquet = expects_parquet(folder, origin, names)
    has_parquet = has_parquet or any(row.parquet_sha256 is not None for row in rows.values())
    kept = _kept_types(folder, names, modalities, rows=rows) if has_parquet else {}
    counts = _missing_counts(folder, names, rows=rows, info=info)
    return [
        RepairTask(
            folder=folder,
            tar_folder=tar_folder,
            name=name,
            row=rows.get(name),
            modalities=modalities,
            has_parquet=has_parquet,
            kept=kept,
            foreign=IndexTask(
                tar_path=tar_folder / f"{name}.tar",
                index_path=folder / f"{name}.idx",
                name=name,
                modalities=modalities,
                skip_incomplete=origin.config.get("skip_incomplete", False),
                min_modalities=origin.config.get("min_modalities", 1),
                measure=has_parquet,
                kept=kept,
            )
            if origin.is_foreign
            else None,
            counts=counts,
        )
        for name in names
    ]


def _kept_types(
    folder: Path,
    names: Sequence[str],
    modalities: Modalities,
    *,
    rows: Mapping[str, ManifestRow],
) -> dict[str, KeptType]:
    """Returns the types of kept columns, from the first intact Parquet file."""
    for name in names:
        try:
            if name in rows:
                check_parquet_sum(folder / f"{name}.parquet", rows[name])
            table = read_shard_parquet(folder / f"{name}.parquet")
        except InputError:
            continue
        return kept_types_of(table.schema, modalities)
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
