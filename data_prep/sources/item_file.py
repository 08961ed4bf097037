"""Reader of the media file of one item, which separates permanent errors from transient ones.

An item is rejected if its file is missing, unreadable or too large. A transient failure of a disk
or server is retried; if it persists, the run stops, so that it cannot change the dataset.
"""

from __future__ import annotations

import errno
import os

from data_prep.errors import (
    InputError,
    RunError,
)
from data_prep.sources.pair import BadItemError
from data_prep.storage import remote_file
from data_prep.storage.retry import RetryPolicy

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
POLICY = RetryPolicy(3, factor=4.0, max_delay_seconds=5.0, min_jitter=1.0)  # 0.5, 2 and 5 s


def read_item_file(path: str, *, max_bytes: int) -> bytes:
    """Reads a file given by a local path or an fsspec URL.

    Args:
        path: path or URL of the file.
        max_bytes: files above this limit are rejected without being read.

    Raises:
        BadItemError: with the reason missing_file, not_a_file, unreadable_file, too_large or
            unknown_scheme.
        RunError: if every attempt failed for a transient reason.
    """
    is_local = remote_file.local_path(path) is not None
    transient = OSError if is_local else Exception  # fsspec's file systems raise arbitrary errors

    def read() -> bytes:
        try:
            return _read(path, max_bytes)
        except Exception as error:
            rejection = _permanent_error(path, error)
            if rejection is not None:
                raise rejection from None
            raise

    def is_transient(error: Exception) -> bool:
        return isinstance(error, transient) and not isinstance(error, (BadItemError, InputError))

    try:
        return POLICY.call(read, is_transient=is_transient)
    except transient as error:
        if not is_transient(error):
            raise
        raise RunError(
            f"{path}: unreadable after {POLICY.num_attempts} attempts: {error}; run the same "
            "command again when the disk or server is available: finished shards are kept"
        ) from error


def _permanent_error(path: str, error: Exception) -> BadItemError | None:
    """Returns the reason to reject the item if the error is permanent, or else None."""
    if isinstance(error, remote_file.UnknownSchemeError):
        return BadItemError("unknown_scheme", str(error))
    if isinstance(error, (BadItemError, InputError)):
        return None
    if isinstance(error, ValueError):  # a name that no file can have
        return BadItemError("missing_file", f"{path!r}: {error}")
    if isinstance(error, FileNotFoundError) or getattr(error, "errno", None) in MISSING:
        return BadItemError("missing_file", path)
    if isinstance(error, PermissionError):
        return BadItemError("unreadable_file", f"{path}: {error.strerror or error}")
    if isinstance(error, (remote_file.NotAFileError, IsADirectoryError)):
        return BadItemError("not_a_file", f"{path}: expected a regular file")
    return None


def _read(path: str, max_bytes: int) -> bytes:
    with remote_file.open_binary(path) as file:
        num_bytes = file.seek(0, os.SEEK_END)
        if num_bytes > max_bytes:
            detail = f"{path}: {num_bytes:,} bytes; expected at most {max_bytes:,}"
            raise BadItemError("too_large", detail)
        file.seek(0)
        return file.read(num_bytes)
