"""Transfers of whole files from a URL to the disk, retried on transient errors.

An http or https URL is read in one streamed request, and a file:// URL is copied. Every other
scheme (s3, gs, hf, ...) goes through fsspec's `get_file`. A failure has one of four types:

    FileNotFoundError     the file, bucket or repository does not exist; not retried
    PermissionError       access denied; not retried
    WrongContentError     the file was complete, but its content was wrong in every attempt
    other OSErrors        the network or server failed in every attempt, or the disk is full
"""

from __future__ import annotations

import errno
import hashlib
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import urllib3

from data_prep.errors import InputError
from data_prep.storage.atomic import sha256_of
from data_prep.storage.remote_file import file_system, is_web_url, local_path
from data_prep.storage.retry import RetryPolicy

Result = TypeVar("Result")
log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 30.0  # without a byte
CHUNK_BYTES = 1 << 20
MAX_REDIRECTS = 10
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
MISSING_STATUSES = (404, 410)
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
TRANSIENT_STATUSES = (408, 425, 429)  # of the 4xx; all 5xx are transient
# Error classes of libraries that are not OSErrors and carry no status.
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError")


class WrongContentError(OSError):
    """A complete file does not have the expected length or sha256."""


def fetch_file(
    url: str,
    path: Path,
    *,
    retries: int,
    num_bytes: int | None = None,
    sha256: str | None = None,
) -> None:
    """Downloads a file in place; a caller that needs it complete renames it afterwards.

    Args:
        url: URL of any scheme that `remote_file` supports.
        path: file to create or overwrite, in an existing folder.
        retries: number of retries after transient failures.
        num_bytes: expected length, or None if unknown.
        sha256: expected checksum, or None if unknown.

    Raises:
        FileNotFoundError, PermissionError, WrongContentError, OSError: as listed in the module's
            docstring.
        InputError: if no library opens this URL.
    """

    def fetch() -> None:
        _transfer(url, path)
        _check_content(url, path, num_bytes=num_bytes, sha256=sha256)

    with_retries(url, fetch, retries=retries)


def with_retries(url: str, action: Callable[[], Result], *, retries: int) -> Result:
    """Calls a function that accesses a URL, and retries it on transient errors.

    Args:
        url: URL of the file, for messages.
        action: reads or writes through any library; safe to repeat.
        retries: number of retries after transient failures.

    Returns:
        The result of `action`.

    Raises:
        FileNotFoundError, PermissionError, WrongContentError, OSError: as listed in the module's
            docstring.
        InputError: if no library opens this URL.
    """
    policy = RetryPolicy(retries)

    def attempt() -> Result:
        try:
            return action()
        except Exception as error:
            failure = _classify(url, error)
            if failure is error:
                raise
            raise failure from error

    def report(failure: Exception, delay: float) -> None:
        log.warning("%s; retrying in %.1f s", failure, delay)

    try:
        return policy.call(attempt, is_transient=_is_transient, on_retry=report)
    except Exception as failure:
        if retries and _is_transient(failure):
            message = f"{failure} (tried {policy.num_attempts} times)"
            raise type(failure)(message) from failure.__cause__
        raise


def fetch_bytes(url: str, folder: Path, *, retries: int) -> bytes:
    """Downloads a small file through a temporary file, and returns its content.

    Args:
        url: URL of any scheme that `remote_file` supports.
        folder: existing folder for the temporary file.
        retries: number of retries after transient failures.

    Raises:
        OSError, InputError: as `fetch_file`.
    """
    path = folder / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}.{secrets.token_hex(8)}"
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
        for chunk in response.stream(CHUNK_BYTES):
            file.write(chunk)


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
    """Converts an error of any library to one of the types in the module's docstring."""
    if isinstance(error, (InputError, WrongContentError)):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error
    status = next((s for e in _causes(error) if (s := _status_of(e)) is not None), None)
    if isinstance(error, NO_FILE) or status in MISSING_STATUSES:
        return FileNotFoundError(errno.ENOENT, f"not found ({_describe(error)})", url)
    is_refused = status is not None and 400 <= status < 500 and status not in TRANSIENT_STATUSES
    names = {type(e).__name__ for e in _causes(error)}
    if isinstance(error, PermissionError) or is_refused or names.intersection(NO_CREDENTIALS):
        return PermissionError(errno.EACCES, f"access denied ({_describe(error)})", url)
    if isinstance(error, (ValueError, TypeError, AttributeError, LookupError, AssertionError)):
        return error  # a wrong argument or a bug: permanent
    return OSError(f"{url}: {_describe(error)}")


def _is_transient(failure: Exception) -> bool:
    if not isinstance(failure, OSError) or failure.errno in DISK_ERRORS:
        return False
    return not isinstance(failure, (FileNotFoundError, PermissionError))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields the error and the chain of its causes."""
    for _ in range(5):
        if error is None:
            return
        yield error
        context = None if error.__suppress_context__ else error.__context__
        error = error.__cause__ or context


def _status_of(error: BaseException) -> int | None:
    """Returns the HTTP status in an error of urllib3, botocore, aiohttp, httpx or gcsfs."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
        status = status or getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _describe(error: Exception) -> str:
    """Returns the message of an error, or the name of its class if the message is empty."""
    name = type(error).__name__
    words = str(error)
    if not words:
        return name
    return words if isinstance(error, (OSError, _StatusError)) else f"{name}: {words}"
