"""Files of a node's cache: locks, parts, and removal of what stands in the place of a file.

The disk of a node may hold anything after a crash or repair. The cache can be filled again, so what
is not as expected is removed.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PART = re.compile(r"\.(?P<shard>.+)\.(tar|idx)\.(?P<num_bytes>[0-9]{1,18})(\.[0-9a-f]{16})?\.part")


@contextmanager
def locked(path: Path, *, waits: bool = True) -> Iterator[bool]:
    """Holds a lock on a file, and yields whether it was acquired.

    The lock ends with the process that holds it. It also excludes threads of the same process,
    because each opens the file anew.
    """
    descriptor = open_file(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # even if a child process inherited it
    finally:
        os.close(descriptor)


def lock_path(shard: Path) -> Path:
    """Returns the file to lock while a shard (a path without suffix) is fetched."""
    return shard.with_name(f".{shard.name}.lock")


def new_part_name(name: str, num_bytes: int) -> str:
    """Returns a unique name for a file during its download, which holds its final size."""
    return f".{name}.{num_bytes}.{secrets.token_hex(8)}.part"


def shard_of_part(name: str) -> str | None:
    """Returns the name of the shard that a part belongs to; None for other files."""
    match = PART.fullmatch(name)
    return match and match["shard"]


def bytes_of_part(name: str) -> int:
    """Returns the bytes that a part reserves; 0 for other files."""
    match = PART.fullmatch(name)
    return int(match["num_bytes"]) if match else 0


def open_file(path: Path, flags: int) -> int:
    """Opens a file, after removing a folder in its place, and returns its descriptor."""
    try:
        return os.open(path, flags, 0o666)
    except IsADirectoryError:
        remove(path)
        return os.open(path, flags, 0o666)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    try:
        path.unlink(missing_ok=True)
    except OSError:  # IsADirectoryError on Linux, PermissionError by POSIX
        if not path.is_dir():
            raise
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Removes a folder in the place of a file, if there is one."""
    if path.is_dir():
        remove(path)


def make_folder(path: Path, *, within: Path) -> None:
    """Creates a folder below another one, after removing files in its place or its parents'."""
    with suppress(FileExistsError, NotADirectoryError):
        path.mkdir(parents=True, exist_ok=True)
        return
    for folder in (path, *path.parents[: len(path.relative_to(within).parts) - 1]):
        if folder.exists() and not folder.is_dir():
            remove(folder)
    path.mkdir(parents=True, exist_ok=True)
