"""Parquet files that hold scores of samples: local copies, and types of their columns."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError
from data_prep.storage.remote_file import glob_files, is_pattern, join, local_path, open_binary

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

INTEGERS = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
NO_TYPE = '"NULL"'
NUMBERS = (*INTEGERS, *(f"U{name}" for name in INTEGERS), "FLOAT", "DOUBLE")


def check_types_of_scores(
    connection: DuckDBPyConnection, files: Sequence[Path], pattern: str
) -> None:
    """Checks that a column has one kind of values in all files; numbers of any type are one kind.

    Raises:
        InputError: if, for example, a column holds numbers in one file and text in another.
    """
    first: dict[str, tuple[str, str, Path]] = {}  # name -> kind, type, file
    for path in files:
        found = connection.read_parquet([str(path)])
        for name, each in zip(found.columns, map(str, found.types), strict=True):
            # A uid is read as text; a column without any value fits every type.
            if name.lower() == "uid" or NO_TYPE in each:
                continue
            kind = "number" if each in NUMBERS or each.startswith("DECIMAL(") else each
            expected, of_first, where = first.setdefault(name.lower(), (kind, each, path))
            if kind != expected:
                raise InputError(
                    f"scores: {pattern}: column {name!r}: expected {of_first} as in {where}, found "
                    f"{each} in {path}; write the column with one type"
                )


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
