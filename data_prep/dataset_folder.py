"""A dataset folder in the making: its lock, its plan, its finished shards, its closing files.

lock_folder      one command at a time writes into a folder
begin_plan       plan.json says what the folder is made from; a different plan is refused
is_finished      a shard is finished if and only if its index matches its tar
finish_dataset   manifest.jsonl, then dataset.json
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.config_file import InputError, differing_keys
from data_prep.shard_format import (
    DatasetInfo,
    ShardIndex,
    fingerprint_of,
    manifest_row,
    write_atomically,
    write_dataset_files,
)

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
# Of shard_writer and write_atomically: .<file>.<process>.tmp
TEMPORARY_NAME = re.compile(r"\..+\.(tar|idx|parquet|json|jsonl)\.\d+\.tmp")


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes the folder, holds its lock, and removes temporary files that dead attempts left.

    Raises:
        InputError: another command is writing into the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"{folder}: another command is writing into this folder; wait for it to end"
            ) from None
        except OSError as error:  # some network file systems lock no folders
            log.warning("%s: cannot be locked (%s); run one command at a time", folder, error)
        for path in folder.rglob(".*.tmp"):
            if TEMPORARY_NAME.fullmatch(path.name):
                path.unlink()
        yield
    finally:
        os.close(descriptor)


def check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Checks that the folder is new, or was begun from the same plan.

    Raises:
        InputError: naming the keys that differ, or what else the folder holds.
    """
    path = folder / PLAN_FILE
    if not path.exists():
        foreign = sorted(str(p.name) for p in folder.glob("*") if p.suffix in (".tar", ".idx"))
        if foreign and plan["command"] == "make_shards":
            raise InputError(
                f"{folder}: expected a new folder (output), or one with a {PLAN_FILE}; found "
                f"{foreign[0]}; choose another output"
            )
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); choose another output") from None
    different = differing_keys(begun, json.loads(json.dumps(plan)))
    if different:
        lines = [f"  {key}: {old!r}, now {new!r}" for key, (old, new) in different.items()]
        raise InputError(
            f"{folder}: was begun from another config or input:\n" + "\n".join(lines) + "\n"
            "go on with the old ones, choose another output, or delete the folder"
        )


def begin_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Writes the plan before any shard, after check_plan.

    Raises:
        InputError: as check_plan.
    """
    check_plan(folder, plan)
    if not (folder / PLAN_FILE).exists():
        write_atomically(folder / PLAN_FILE, json.dumps(plan, indent=2).encode() + b"\n")


def is_finished(index_path: Path, tar_path: Path) -> bool:
    """Whether the index is there, is readable, and belongs to a tar of this size."""
    if not (index_path.exists() and tar_path.exists()):
        return False
    try:
        return ShardIndex.read(index_path).tar_bytes == tar_path.stat().st_size
    except InputError:
        return False


def finish_dataset(
    folder: Path,
    names: Sequence[str],
    *,
    media: str,
    preparation: dict[str, Any],
    tar_folder: str = ".",
) -> DatasetInfo:
    """Writes manifest.jsonl and dataset.json of finished shards.

    Shards that lost all their samples stay on disk, but are not in the manifest.
    """
    indexes = [ShardIndex.read(folder / f"{name}.idx") for name in names]
    manifest = [
        manifest_row(folder, name)
        for name, index in zip(names, indexes, strict=True)
        if index.num_samples
    ]
    info = DatasetInfo(
        media=media,
        fields=sorted({name for index in indexes for name in index.fields}),
        num_samples=sum(row.num_samples for row in manifest),
        num_shards=len(manifest),
        tar_bytes=sum(row.tar_bytes for row in manifest),
        fingerprint=fingerprint_of(manifest),
        rejected=dict(sorted(sum_rejected(indexes).items())),
        preparation=preparation,
        isopair_version=_isopair_version(),
        tar_folder=tar_folder,
    )
    write_dataset_files(folder, info, manifest=manifest)
    return info


def sum_rejected(indexes: Sequence[ShardIndex]) -> Counter[str]:
    """Rejected pairs by reason, over all shards."""
    return sum((Counter(index.rejected) for index in indexes), Counter())


def _isopair_version() -> str:
    try:
        return importlib.metadata.version("isopair")
    except importlib.metadata.PackageNotFoundError:
        return ""
