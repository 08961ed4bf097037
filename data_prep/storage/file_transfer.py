"""Whole files from a URL to the disk, tried again while what fails may pass.

http and https come in one streamed request; file:// is copied; every other scheme (s3, gs, hf, ...)
is left to fsspec's `get_file`. A failure is one of four:

    FileNotFoundError     the file, its bucket or its repository is not there: never tried again
    PermissionError       it is not given to us: never tried again
    WrongContentError     it came whole, and is not what was expected, at every try
    other OSErrors        the network or server failed at every try, or the disk cannot take it
"""

from __future__ import annotations

import errno
import hashlib
import logging
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import urllib3

from data_prep.errors import InputError
from data_prep.storage.atomic import sha256_of
from data_prep.storage.remote_file import file_system, is_web_url, local_path

Result = TypeVar("Result")
log = logging.getLogger(__name__)

FIRST_DELAY_SECONDS = 0.5  # doubled at each further try
LONGEST_DELAY_SECONDS = 30.0
TIMEOUT_SECONDS = 30.0  # without a byte
PIECE_BYTES = 1 << 20
MAX_REDIRECTS = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
MISSING_STATUSES = (404, 410)
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
# Of the refusals, those that say: later.
PASSING_STATUSES = (408, 425, 429)
# Classes of libraries that are no OSErrors and carry no status.
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError")


class WrongContentError(OSError):
    """A file that came to its end has not the expected length or sha256."""


def fetch_file(
    url: str,
    path: Path,
    *,
    retries: int,
    num_bytes: int | None = None,
    sha256: str | None = None,
) -> None:
    """Writes the file at `url` to `path`, in place: whoever needs it whole renames it.

    Args:
        url: of any scheme that remote_file knows.
        path: file that is made, or overwritten; its folder is there.
        retries: further tries after a failure that may pass.
        num_bytes, sha256: what it must have; checked where given.

    Raises:
        FileNotFoundError, PermissionError, WrongContentError, OSError: see this module's head.
        InputError: no library opens this URL.
    """

    def fetch() -> None:
        _transfer(url, path)
        _check_content(url, path, num_bytes=num_bytes, sha256=sha256)

    with_tries(url, fetch, retries=retries)


def with_tries(url: str, action: Callable[[], Result], *, retries: int) -> Result:
    """What `action` returns, tried again while what fails may pass.

    Args:
        url: of the file that it is about.
        action: reads or writes through any library.
        retries: further tries.

    Raises:
        FileNotFoundError, PermissionError, WrongContentError, OSError: see this module's head.
        InputError: no library opens this URL.
    """
    for nth in range(retries + 1):
        try:
            return action()
        except Exception as error:
            failure = _classify(url, error)
            if _is_final(failure):
                raise failure from error
            if nth == retries:
                raise _after_tries(failure, retries + 1) from error
            delay = min(FIRST_DELAY_SECONDS * 2**nth, LONGEST_DELAY_SECONDS)
            delay *= random.uniform(0.5, 1)  # so that a cluster does not ask in step
            log.warning("%s; trying again in %.1f s", failure, delay)
            time.sleep(delay)
    raise AssertionError("the last try returns or raises")


def fetch_bytes(url: str, folder: Path, *, retries: int) -> bytes:
    """The content of a small file, by way of a temporary one in `folder`.

    Raises:
        OSError, InputError: as fetch_file.
    """
    path = folder / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}.{random.getrandbits(64):x}"
    try:
        fetch_file(url, path, retries=retries)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def _transfer(url: str, path: Path) -> None:
    local = local_path(url)
    if local is not None:
        shutil.copyfile(local, path)
    elif is_web_url(url):
        _transfer_from_web(url, path)
    else:
        files, inner = file_system(url)
        files.get_file(inner, str(path))


def _transfer_from_web(url: str, path: Path) -> None:
    with (
        path.open("wb") as file,
        urllib3.PoolManager(timeout=TIMEOUT_SECONDS) as pool,
        pool.request(
            "GET",
            url,
            headers={"Accept-Encoding": "identity"},
            preload_content=False,
            retries=urllib3.Retry(MAX_REDIRECTS, connect=0, read=0, status=0, other=0),
        ) as response,
    ):
        if response.status != 200:
            raise _StatusError(response.status)
        for piece in response.stream(PIECE_BYTES):
            file.write(piece)


class _StatusError(Exception):
    def __init__(self, status: int):
        super().__init__(f"the server answers {status}")
        self.status = status


def _check_content(url: str, path: Path, *, num_bytes: int | None, sha256: str | None) -> None:
    found_bytes = path.stat().st_size
    if num_bytes is not None and found_bytes != num_bytes:
        raise WrongContentError(f"{url}: expected {num_bytes} bytes, found {found_bytes}")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise WrongContentError(f"{url}: expected sha256 {sha256}, found {found}")


# ------------------------------------------------------------------------------------- failures


def _classify(url: str, error: Exception) -> Exception:
    """What a library raised, as one of the classes that this module's head lists."""
    if isinstance(error, (InputError, WrongContentError)):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error
    status = next((s for e in _causes(error) if (s := _status_of(e)) is not None), None)
    if isinstance(error, NO_FILE) or status in MISSING_STATUSES:
        return FileNotFoundError(errno.ENOENT, f"not there ({_in_words(error)})", url)
    is_refused = status is not None and 400 <= status < 500 and status not in PASSING_STATUSES
    names = {type(e).__name__ for e in _causes(error)}
    if isinstance(error, PermissionError) or is_refused or names.intersection(NO_CREDENTIALS):
        return PermissionError(errno.EACCES, f"not given ({_in_words(error)})", url)
    if isinstance(error, (ValueError, TypeError, AttributeError, LookupError, AssertionError)):
        return error  # a wrong argument or a fault of a program, which stays
    return OSError(f"{url}: {_in_words(error)}")


def _is_final(failure: Exception) -> bool:
    if isinstance(failure, OSError):
        is_of_disk = failure.errno in DISK_ERRORS
        return is_of_disk or isinstance(failure, (FileNotFoundError, PermissionError))
    return True


def _after_tries(failure: Exception, num_tries: int) -> Exception:
    if num_tries == 1:
        return failure
    return type(failure)(f"{failure} (tried {num_tries} times)")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from."""
    for _ in range(5):
        if error is None:
            return
        yield error
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context


def _status_of(error: BaseException) -> int | None:
    """The status of the response that an error of urllib3, botocore, aiohttp, httpx or gcsfs is
    about."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
        status = status or getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _in_words(error: Exception) -> str:
    """The message, or the name of a class that comes without one."""
    name = type(error).__name__
    words = str(error)
    if not words:
        return name
    return words if isinstance(error, (OSError, _StatusError)) else f"{name}: {words}"
