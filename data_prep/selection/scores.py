"""Local copies of the Parquet files that hold scores of samples."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_prep.errors import InputError
from data_prep.storage.remote_file import glob_files, is_pattern, join, local_path, open_binary


def local_copies(pattern: str, *, downloads: Path) -> list[Path]:
    """Lists the files of a path, URL or glob pattern; remote files are copied first.

    Args:
        pattern: path, URL or glob pattern.
        downloads: folder for the copies.

    Raises:
        InputError: if there is no such file, or one cannot be read.
    """
    paths = [pattern]
    if is_pattern(pattern):
        folder, names = glob_files(pattern)
        paths = [join(folder, name) for name in names]
    if not paths:
        raise InputError(f"scores: {pattern}: expected a Parquet file or a glob, found none")
    return [
        _local_copy(path, copy=downloads / f"{number}.parquet") for number, path in enumerate(paths)
    ]


def _local_copy(path: str, *, copy: Path) -> Path:
    local = local_path(path)
    try:
        with open_binary(path) as source:
            if local is not None:
                return local.absolute()
            copy.parent.mkdir(exist_ok=True)
            with copy.open("wb") as target:
                shutil.copyfileobj(source, target)
    except OSError as error:
        raise InputError(f"scores: {path}: cannot be read: {error.strerror or error}") from None
    return copy
