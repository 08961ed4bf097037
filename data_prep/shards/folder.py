"""A dataset folder to which commands write: lock, plan, finished shards, manifest.

lock_folder        locks the folder for one command, or one part of it for each of several commands
begin_plan         records the settings and input in plan.json; a different plan is refused
index_if_finished  reads the index of a shard; the shard is finished if its index matches its tar
finish_dataset     writes manifest.jsonl, then dataset.json
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from data_prep.config_file import differing_keys, with_defaults
from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.index import ShardIndex
from data_prep.shards.manifest import (
    FORMAT_VERSION,
    DatasetInfo,
    IndexTotals,
    ManifestRow,
    fingerprint_of,
    manifest_row,
    write_dataset_files,
)
from data_prep.storage.atomic import write_atomically
from data_prep.versions import package_version

log = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
# Names of files that make_shards writes; it would reuse or delete other files with such names.
OWN_NAME = re.compile(
    r".*\.(tar|idx)|\d{8}\.parquet|dataset\.json|manifest\.jsonl|rejected(\.jsonl)?|plan|downloads"
)
# Names that storage.atomic.temporary_name builds: .<file>.<host>.<thread>.tmp
TEMPORARY_NAME = re.compile(
    r"\.(?P<stem>[^.]+)(\.(tar|idx|parquet|json|jsonl))?\.[A-Za-z0-9-]+\.\d+\.tmp"
)


@contextmanager
def lock_folder(folder: Path, *, part: str | None = None) -> Iterator[bool]:
    """Creates the folder and holds its lock; yields True if the file system supports locks.

    A command that locks the whole folder first removes the temporary files of interrupted attempts.

    Args:
        folder: dataset folder.
        part: part that the command writes, such as "0/8". Other commands may then write other parts
            with the same total. If None, no other command may write.

    Raises:
        InputError: if another command is writing into the folder or into this part of it. Parts
            with a different n are also excluded, because they share shards with this part.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        is_locked = _lock(folder, fcntl.LOCK_EX if part is None else fcntl.LOCK_SH, stack)
        if part is not None:
            path = folder / f".part-{part.replace('/', '-of-')}.lock"
            path.touch()
            is_locked = _lock(path, fcntl.LOCK_EX, stack) and is_locked
            for other in _locks_of_other_totals(folder, part):
                with ExitStack() as probe:
                    _lock(other, fcntl.LOCK_SH, probe)
        elif is_locked:
            remove_leftovers(folder)
        try:
            yield is_locked
        finally:
            with suppress(OSError):
                folder.rmdir()  # fails, and is ignored, unless the folder is empty


def _locks_of_other_totals(folder: Path, part: str) -> list[Path]:
    total = part.partition("/")[2]
    return [p for p in folder.glob(".part-*.lock") if not p.stem.endswith(f"-of-{total}")]


def _lock(path: Path, kind: int, stack: ExitStack) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(
            f"{path}: another command is writing into this folder; wait until it has ended"
        ) from None
    except OSError as error:  # some network file systems do not support locks
        log.warning("%s: cannot be locked (%s); run one command at a time", path, error)
        return False
    return True


def remove_leftovers(folder: Path, *, stems: Collection[str] | None = None) -> None:
    """Removes the temporary files of interrupted attempts.

    Args:
        folder: locked dataset folder.
        stems: names of shards; None removes all temporary files and the locks of parts.
    """
    for path in folder.glob(".part-*.lock") if stems is None else ():
        path.unlink()
    for path in [*folder.glob(".*.tmp"), *folder.glob("rejected/.*.tmp")]:
        match = TEMPORARY_NAME.fullmatch(path.name)
        if match is None or (stems is not None and match["stem"] not in stems):
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def check_plan(
    folder: Path,
    made_from: dict[str, Any],
    *,
    plan_folder: str = ".",
    defaults: dict[str, Any] | None = None,
) -> None:
    """Checks that the folder is new, or was created with the same settings and input.

    Args:
        folder: dataset folder.
        made_from: command, settings and input of this attempt; compared with plan.json.
        plan_folder: folder that contains plan.json, relative to `folder`.
        defaults: values of settings that the plan of an earlier version may lack.

    Raises:
        InputError: if settings or input differ, or the folder contains other files. The message
            includes the differing keys or the first file.
    """
    path = folder / plan_folder / PLAN_FILE
    if not path.exists():
        foreign = sorted(p.name for p in folder.glob("*") if OWN_NAME.fullmatch(p.name))
        # Checked again, because another part may have started in the meantime.
        if foreign and made_from["command"] == "make_shards" and not path.exists():
            raise InputError(
                f"{folder}: expected a new folder (output), or one with a {PLAN_FILE}; found "
                f"{foreign[0]}; choose another output"
            )
        return
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))["made_from"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); choose another output") from None
    begun = with_defaults(begun, defaults or {})
    different = differing_keys(begun, json.loads(json.dumps(made_from)))
    if different:
        lines = [f"  {key}: {old!r}, now {new!r}" for key, (old, new) in different.items()]
        raise InputError(
            f"{folder}: was created with a different config or input:\n" + "\n".join(lines) + "\n"
            "restore the old values, choose another output, or delete the folder"
        )


def begin_plan(folder: Path, made_from: dict[str, Any]) -> None:
    """Checks the plan and writes it before any shard is written.

    Raises:
        InputError: in the same cases as `check_plan`.
    """
    path = folder / PLAN_FILE
    check_plan(folder, made_from)
    if not path.exists():
        write_atomically(path, json.dumps({"made_from": made_from}, indent=2).encode() + b"\n")


def index_if_finished(index_path: Path, tar_path: Path) -> ShardIndex | None:
    """Returns the index of a finished shard; None if it is missing or does not match the tar."""
    if not (index_path.exists() and tar_path.exists()):
        return None
    try:
        index = ShardIndex.read(index_path)
    except InputError:
        return None
    return index if index.tar_bytes == tar_path.stat().st_size else None


def finish_dataset(
    folder: Path,
    names: Iterable[str],
    *,
    media: str = "",
    modalities: Modalities | None = None,
    labels: Sequence[str] = (),
    preparation: dict[str, Any],
    num_pairs: int | None = None,
    tar_folder: str = ".",
    isopair_version: str | None = None,
) -> DatasetInfo:
    """Writes manifest.jsonl and dataset.json for finished shards.

    Shards without samples stay on disk, but the manifest does not list them. A repair passes the
    version that made the dataset; None is the version that runs.

    Args:
        folder: dataset folder.
        names: names of all shards, in order.
        media: "image" or "audio", of a pair dataset.
        modalities: modalities of any other dataset; their counts and statistics are filled in.
        labels: names of the label columns.
        preparation: command, settings and input.
        num_pairs: number of rows in the input.
        tar_folder: folder of the tars, relative to `folder`.
        isopair_version: version that made the dataset.
    """
    manifest: list[ManifestRow] = []
    totals = IndexTotals(modalities)
    for name in names:
        index = ShardIndex.read(folder / f"{name}.idx")
        totals.add(index)
        if index.num_samples:
            manifest.append(manifest_row(folder, name))
    counted = totals.modalities()
    named: dict[str, Any] = {"media": media}
    if counted is not None:
        named = {
            "media": next((counted[name].kind for name in counted.media), ""),
            "modalities": counted.to_json(),
            "labels": list(labels),
            "format_version": FORMAT_VERSION,
        }
    info = DatasetInfo(
        **named,
        fields=sorted(totals.fields),
        num_samples=sum(row.num_samples for row in manifest),
        num_shards=len(manifest),
        tar_bytes=sum(row.tar_bytes for row in manifest),
        fingerprint=fingerprint_of(manifest),
        rejected=dict(sorted(totals.rejected.items())),
        marked=dict(sorted(totals.marked.items())),
        preparation=preparation,
        num_pairs=num_pairs,
        isopair_version=(
            package_version("isopair") or "" if isopair_version is None else isopair_version
        ),
        tar_folder=tar_folder,
    )
    write_dataset_files(folder, info, manifest=manifest)
    return info
