"""Classification of I/O errors of any library, and retries of the transient ones.

Each failure becomes one of five types:

    FileNotFoundError     the file, bucket or repository does not exist; not retried
    PermissionError       access denied; not retried
    PermanentError        the file cannot be used in this way; not retried
    WrongContentError     the file was complete, but its content was wrong in every attempt
    other OSErrors        the network or server failed in every attempt, or the disk is full
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from data_prep.errors import InputError
from data_prep.storage.retry import RetryPolicy

Result = TypeVar("Result")
log = logging.getLogger(__name__)

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
MISSING_STATUSES = (404, 410)
NO_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
TRANSIENT_STATUSES = (408, 425, 429)  # of the 4xx; all 5xx are transient
# Error classes of libraries that neither derive from OSError nor have an HTTP status.
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "NoAuthTokenError")


class WrongContentError(OSError):
    """A complete file does not have the expected length or sha256."""


class PermanentError(OSError):
    """A failure that would recur on every retry."""


def with_retries(url: str, action: Callable[[], Result], *, retries: int) -> Result:
    """Calls a function that accesses a URL, and retries it on transient errors.

    Args:
        url: URL of the file, for messages.
        action: reads or writes through any library; safe to repeat.
        retries: number of retries after transient failures.

    Returns:
        The result of `action`.

    Raises:
        FileNotFoundError, PermissionError, PermanentError, WrongContentError, OSError: as listed
            in the module's docstring.
        InputError: if no library opens URLs with this scheme.
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


def _classify(url: str, error: Exception) -> Exception:
    """Converts an error of any library to one of the types in the module's docstring."""
    if isinstance(error, (InputError, WrongContentError, PermanentError)):
        return error
    if isinstance(error, OSError) and error.errno in DISK_ERRORS:
        return error
    status = next((s for e in _causes(error) if (s := _status_of(e)) is not None), None)
    if isinstance(error, NO_FILE) or status in MISSING_STATUSES:
        return FileNotFoundError(errno.ENOENT, f"not found ({_describe(url, error)})", url)
    is_refused = status is not None and 400 <= status < 500 and status not in TRANSIENT_STATUSES
    names = {type(e).__name__ for e in _causes(error)}
    if isinstance(error, PermissionError) or is_refused or names.intersection(NO_CREDENTIALS):
        return PermissionError(errno.EACCES, f"access denied ({_describe(url, error)})", url)
    if isinstance(error, (ValueError, TypeError, AttributeError, LookupError, AssertionError)):
        return error  # a wrong argument or a bug: permanent
    return OSError(f"{url}: {_describe(url, error)}")


def _is_transient(failure: Exception) -> bool:
    if not isinstance(failure, OSError) or failure.errno in DISK_ERRORS:
        return False
    return not isinstance(failure, (FileNotFoundError, PermissionError, PermanentError))


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
    if type(error).__module__ == "aiohttp.http_exceptions":
        return None  # a broken response; its `code` of 400 was not sent by the server
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore's
        status: Any = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(response, "status_code", None)
        status = status or getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) and 100 <= status < 600 else None


def _describe(url: str, error: Exception) -> str:
    """Returns the message of an error, or the name of its class if the message is empty."""
    if type(error).__name__ == "ClientResponseError":  # raised by aiohttp
        return f"HTTP status {error.status}"
    message = str(error)
    if isinstance(error, FileNotFoundError) and message == url:  # raised by fsspec over http
        return "HTTP status 404"
    name = type(error).__name__
    if not message:
        return name
    return message if isinstance(error, OSError) else f"{name}: {message}"
