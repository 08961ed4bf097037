"""Atomic file writes, checksums, and errors that name their file."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import socket
import threading
from pathlib import Path

# Errors of file systems that cannot flush folders, such as mounted object stores, and of folders
# without read permission.
NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EBADF, errno.EACCES)


def temporary_name(name: str) -> str:
    """Returns a temporary name in the same folder, unique among threads and machines."""
    host = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())
    return f".{name}.{host}.{threading.get_native_id()}.tmp"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that is either complete or absent, even after a power cut.

    Raises:
        OSError: if the file cannot be written (full disk); the message includes the file.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise name_file(error, path) from None


def flush_to_disk(path: Path) -> None:
    """Flushes a file, or the names in a folder, from memory to the disk.

    Raises:
        OSError: if the disk fails.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    try:
        flush_to_disk(path)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def sha256_of(path: Path) -> str:
    """Computes the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def name_file(error: OSError, path: Path) -> OSError:
    """Adds the file name to an error without one, such as the error of a full disk."""
    if error.filename is None:
        error.filename = str(path)
    return error
