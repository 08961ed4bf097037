"""Where the scores of samples come from: Parquet files of a user, and embeddings of eval.embed."""

from __future__ import annotations

import shutil
from pathlib import Path

from data_prep.errors import InputError
from data_prep.storage.remote_file import glob_files, is_pattern, join, local_path, open_binary


def local_copies(pattern: str, *, downloads: Path) -> list[Path]:
    """The files of a glob (or the one file), those from elsewhere copied into `downloads`.

    Raises:
        InputError: there is none, or one cannot be read.
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
