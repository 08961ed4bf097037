"""Downloads one URL into a file, with redirects, limits and retries.

1. An attempt follows redirects. Each hop is checked for permission, occupies one of the host's
   connections, and must end within the time limit.
2. The body is written as it arrives, up to max_bytes.
3. Transient errors are retried with exponential backoff, or after the delay that the server
requests.
"""

from __future__ import annotations

import email.utils
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import IncompleteRead

from urllib3 import BaseHTTPResponse, Timeout
from urllib3 import exceptions as urllib3_errors

from data_prep.config import DownloadOptions
from data_prep.download.address import DownloadError, WebAddress, parse_address, redirected_address
from data_prep.download.body import CHUNK_BYTES, ResponseBody
from data_prep.download.cache import DownloadCache, DownloadsEnded, FetchRecord
from data_prep.download.connection import ConnectionWatch, Exchange, build_connection_pools
from data_prep.storage.retry import RetryPolicy

MAX_DELAY_SECONDS = 60.0  # even if a server requests a longer delay
REDIRECTS = frozenset({301, 302, 303, 307, 308})
NOT_FOUND, REFUSED = frozenset({404, 410}), frozenset({401, 403, 451})
TRANSIENT_STATUSES = frozenset({408, 425, 429})  # in addition to 5xx

CheckAddress = Callable[[WebAddress], None]
CheckResponse = Callable[[BaseHTTPResponse], None]


class WebFetcher:
    """Fetches URLs; thread-safe.

    Args:
        options: limits and crawling policy.
        cache: cache that limits the connections per host.
        watch: watch that ends overdue exchanges, and all exchanges when it is closed.
    """

    def __init__(self, options: DownloadOptions, *, cache: DownloadCache, watch: ConnectionWatch):
        self._options = options
        self._cache = cache
        self._watch = watch
        self._policy = RetryPolicy(options.retries, max_delay_seconds=MAX_DELAY_SECONDS)
        self._pools = build_connection_pools(
            watch,
            private_hosts=options.private_hosts,
            connections_per_host=options.connections_per_host,
            num_hosts=2 * options.threads,
        )

    def close(self) -> None:
        """Closes all connections."""
        self._pools.clear()

    def fetch(
        self,
        url: str,
        path: str,
        *,
        max_bytes: int,
        cut: bool = False,
        check_address: CheckAddress,
        check_response: CheckResponse,
    ) -> FetchRecord:
        """Downloads a URL into a file, and records the outcome.

        Args:
            url: URL as given in the input.
            path: file to write, exclusive to this call.
            max_bytes: maximum length of the body.
            cut: whether to truncate a longer body instead of rejecting it.
            check_address: called with the address of every hop; raises DownloadError.
            check_response: called with every redirect and with the final response before its body
                is read; raises DownloadError.

        Raises:
            DownloadsEnded: if the downloader was closed.
            RunError: if the disk is full or an I/O error occurs.
        """

        def attempt() -> FetchRecord:
            address = parse_address(url)
            body = ResponseBody(path, max_bytes=max_bytes, cut=cut, cache=self._cache)
            self._follow(address, body, check_address, check_response)
            return FetchRecord(
                num_bytes=body.num_bytes,
                sha256=body.sha256.hexdigest(),
                max_bytes=max_bytes,
                time=time.time(),
            )

        try:
            return self._policy.call(attempt, is_transient=self._is_transient, wait=self._wait)
        except DownloadError as error:
            if self._watch.closed.is_set():
                raise DownloadsEnded from None
            return FetchRecord(
                reason=error.reason,
                detail=error.detail,
                is_transient=error.is_transient,
                status=error.status,
                max_bytes=max_bytes,
                time=time.time(),
            )

    def _is_transient(self, error: Exception) -> bool:
        is_closed = self._watch.closed.is_set()
        return isinstance(error, DownloadError) and error.is_transient and not is_closed

    def _wait(self, error: DownloadError, delay: float) -> None:
        if self._watch.closed.wait(retry_seconds(delay, error)):
            raise DownloadsEnded

    def _follow(
        self,
        address: WebAddress,
        body: ResponseBody,
        check_address: CheckAddress,
        check_response: CheckResponse,
    ) -> None:
        for _ in range(self._options.max_redirects + 1):
            check_address(address)
            with (
                self._cache.host_slot(address.host, num_slots=self._options.connections_per_host),
                self._watch.exchange(self._options.total_timeout_seconds) as exchange,
                _urllib3_errors(address, exchange, self._options),
                self._response(address) as response,
            ):
                location = response.headers.get("Location")
                is_redirect = response.status in REDIRECTS and bool(location)
                if not is_redirect:
                    _check_status(response)
                check_response(response)
                if not is_redirect:
                    body.read(response)
                    self._check_end(exchange)
                    return
            address = redirected_address(address, location)
        raise DownloadError(
            "download_too_many_redirects", f"more than {self._options.max_redirects} redirects"
        )

    def _check_end(self, exchange: Exchange) -> None:
        """Raises an error if the watch aborted a body of unknown length, which seems complete."""
        if exchange.is_overdue:
            raise DownloadError("download_timeout", "", is_transient=True)
        if self._watch.closed.is_set():
            raise DownloadsEnded

    @contextmanager
    def _response(self, address: WebAddress) -> Iterator[BaseHTTPResponse]:
        headers = {
            "User-Agent": self._options.user_agent,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
        }
        if address.authorization is not None:
            headers["Authorization"] = address.authorization
        response = self._pools.urlopen(
            "GET",
            address.url,
            headers=headers,
            redirect=False,
            retries=False,
            preload_content=False,
            decode_content=False,
            timeout=Timeout(
                connect=self._options.connect_timeout_seconds,
                read=self._options.read_timeout_seconds,
            ),
        )
        try:
            yield response
        finally:
            _finish(response)


def retry_seconds(delay: float, error: DownloadError) -> float:
    """Computes the delay before a retry: the policy's delay, or a longer one that a server
    requests.

    Args:
        delay: delay of the retry policy, in seconds.
        error: failure of the last attempt.
    """
    return min(max(delay, error.retry_after_seconds or 0.0), MAX_DELAY_SECONDS)


def _finish(response: BaseHTTPResponse) -> None:
    """Returns the connection to its pool, or closes it if much of the body was not read."""
    if 0 < (response.length_remaining or 0) <= CHUNK_BYTES:
        response.drain_conn()
    if not response.closed:
        response.close()
    response.release_conn()


def _check_status(response: BaseHTTPResponse) -> None:
    status = response.status
    if status == 200:
        return
    if status in NOT_FOUND:
        raise DownloadError("download_not_found", f"status {status}", status=status)
    if status in REFUSED:
        raise DownloadError("download_refused", f"status {status}", status=status)
    raise DownloadError(
        "download_http_error",
        f"status {status}",
        is_transient=status in TRANSIENT_STATUSES or status >= 500,
        status=status,
        retry_after_seconds=_retry_after_seconds(response.headers.get("Retry-After")),
    )


def _retry_after_seconds(header: str | None) -> float | None:
    """Converts a Retry-After header (seconds or a date) to seconds."""
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return email.utils.parsedate_to_datetime(header).timestamp() - time.time()
    except ValueError:
        return None


@contextmanager
def _urllib3_errors(
    address: WebAddress, exchange: Exchange, options: DownloadOptions
) -> Iterator[None]:
    """Converts errors of urllib3, http.client and sockets to DownloadErrors."""
    try:
        yield
    except DownloadError:
        if exchange.is_overdue:  # the watch aborted the exchange
            raise _overdue(address, options) from None
        raise
    except (urllib3_errors.HTTPError, OSError) as error:
        if exchange.is_overdue:
            raise _overdue(address, options) from None
        raise _download_error(address, error, options) from None


def _overdue(address: WebAddress, options: DownloadOptions) -> DownloadError:
    return DownloadError(
        "download_timeout",
        f"{address.host}: no complete response within {options.total_timeout_seconds} s",
        is_transient=True,
    )


def _download_error(
    address: WebAddress, error: Exception, options: DownloadOptions
) -> DownloadError:
    if isinstance(error, urllib3_errors.TimeoutError):
        message = f"{address.host}: no data for {options.read_timeout_seconds} s"
        return DownloadError("download_timeout", message, is_transient=True)
    if isinstance(error, urllib3_errors.SSLError | ssl.SSLError):
        is_certificate = "CERTIFICATE_VERIFY_FAILED" in str(error)
        message = f"{address.host}: TLS: {error}"
        return DownloadError("download_unreachable", message, is_transient=not is_certificate)
    if isinstance(error.args[-1] if error.args else None, IncompleteRead):
        message = f"{address.host}: truncated body"
        return DownloadError("download_http_error", message, is_transient=True)
    if isinstance(error, urllib3_errors.LocationValueError):
        return DownloadError("download_bad_url", f"{address.host}: {error}")
    return DownloadError("download_unreachable", f"{address.host}: {error}", is_transient=True)
