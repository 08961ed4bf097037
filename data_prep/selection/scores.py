"""Where the scores of samples come from: Parquet files of a user, and embeddings of eval.embed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from data_prep.config_file import InputError
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


def check_embeddings(folder: Path, fingerprint: str) -> None:
    """Checks that a folder holds the finished embeddings of a dataset.

    Args:
        folder: that python -m eval.embed wrote.
        fingerprint: of the dataset.

    Raises:
        InputError: it is unfinished, or of another dataset.
    """
    path = folder / "embeddings.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["dataset_fingerprint"]
    except OSError as error:
        raise InputError(
            f"{path}: expected finished embeddings: {error.strerror}; make them, or finish them, "
            "with python -m eval.embed"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); delete it and run eval.embed") from None
    if found != fingerprint:
        raise InputError(
            f"{folder}: embeddings of another dataset, with fingerprint {found}; expected "
            f"{fingerprint}; make them with python -m eval.embed"
        )
