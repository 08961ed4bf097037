"""Reads the media file of one item and separates permanent faults from transient ones.

A missing, unreadable or oversized file is a fault of the item and rejects it. A transient failure
of a disk or server is retried, and then stops the run, so that it never changes the dataset.
"""

from __future__ import annotations

import errno
import os
import time

from data_prep.errors import (
    InputError,
    RunError,
)
from data_prep.sources.pair import BadItemError
from data_prep.storage import remote_file

MISSING = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
SECONDS_BETWEEN_ATTEMPTS = (0.5, 2.0, 5.0)


def read_item_file(path: str, *, max_bytes: int) -> bytes:
    """Reads a file given by a local path or an fsspec URL.

    Args:
        path: path or URL of the file.
        max_bytes: limit above which a file is rejected unread.

    Raises:
        BadItemError: with the reason missing_file, not_a_file, unreadable_file, too_large or
            unknown_scheme.
        RunError: if every attempt failed for a transient reason.
    """
    is_local = remote_file.local_path(path) is not None
    passing = OSError if is_local else Exception  # fsspec's file systems raise all kinds
    for pause in (*SECONDS_BETWEEN_ATTEMPTS, None):
        try:
            return _read(path, max_bytes)
        except remote_file.UnknownSchemeError as error:
            raise BadItemError("unknown_scheme", str(error)) from None
        except (BadItemError, InputError):
            raise
        except ValueError as error:  # a name that no file can have
            raise BadItemError("missing_file", f"{path!r}: {error}") from None
        except passing as error:
            _raise_lasting(path, error)
            if pause is None:
                raise RunError(
                    f"{path}: not readable after {len(SECONDS_BETWEEN_ATTEMPTS) + 1} attempts: "
                    f"{error}; run the same command again when the disk or server answers: "
                    "finished shards are kept"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _raise_lasting(path: str, error: Exception) -> None:
    number = getattr(error, "errno", None)
    if isinstance(error, FileNotFoundError) or number in MISSING:
        raise BadItemError("missing_file", path) from None
    if isinstance(error, PermissionError):
        raise BadItemError("unreadable_file", f"{path}: {error.strerror or error}") from None
    if isinstance(error, (remote_file.NotAFileError, IsADirectoryError)):
        raise BadItemError("not_a_file", f"{path}: expected an ordinary file") from None


def _read(path: str, max_bytes: int) -> bytes:
    with remote_file.open_binary(path) as file:
        num_bytes = file.seek(0, os.SEEK_END)
        if num_bytes > max_bytes:
            detail = f"{path}: {num_bytes:,} bytes; at most {max_bytes:,} are read"
            raise BadItemError("too_large", detail)
        file.seek(0)
        return file.read(num_bytes)
