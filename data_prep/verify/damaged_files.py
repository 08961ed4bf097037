"""The folder `damaged/` of a dataset, which keeps files that a repair replaces.

A repair never deletes what it cannot recover: a replaced file stays there until a person deletes
it.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from contextlib import suppress
from pathlib import Path

DAMAGED_FOLDER = "damaged"


def is_set_aside(path: Path, folder: Path) -> bool:
    """Returns True for files in the folder `damaged/` of a dataset."""
    return path.relative_to(folder).parts[0] == DAMAGED_FOLDER


def set_aside(path: Path, *, folder: Path) -> Path:
    """Links a file into `damaged/`, under its name or the name with a number; returns that path.

    An equal file that an interrupted repair left there is used again.

    Args:
        path: file in the dataset folder; it stays until it is replaced or removed.
        folder: dataset folder.
    """
    relative = path.relative_to(folder)
    number = 0
    while True:
        # The suffix stays, because a repair looks for tars, indexes and Parquet files by suffix.
        numbered = f"{relative.stem}.{number}{relative.suffix}"
        name = relative if not number else relative.with_name(numbered)
        target = folder / DAMAGED_FOLDER / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(path, target)
            return target
        if filecmp.cmp(path, target, shallow=False):
            return target
        number += 1


def remove_if_empty(folder: Path) -> None:
    """Removes the folder `damaged/` of a dataset, and folders in it, that hold no file."""
    damaged = folder / DAMAGED_FOLDER
    inner = sorted((path for path in damaged.rglob("*") if path.is_dir()), reverse=True)
    for path in [*inner, damaged]:
        with suppress(OSError):
            path.rmdir()  # fails, and is ignored, unless the folder is empty


def link_or_copy(path: Path, target: Path) -> None:
    """Creates a second name of a file, or a copy where the file system has no links."""
    if path.is_symlink():
        target.symlink_to(path.resolve())
        return
    try:
        os.link(path, target)
    except OSError:
        shutil.copyfile(path, target)
