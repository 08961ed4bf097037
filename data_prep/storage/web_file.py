"""A seekable file on a web server, streamed through fsspec.

fsspec's own seekable file does not suffice for large inputs. It neither retries requests nor
resumes a broken response, and it does not detect that a file changed between two range requests.
`WebFile` adds all three to fsspec's streaming file.

For media URLs in a manifest, `data_prep.download` is used instead; it checks permissions first.
"""

from __future__ import annotations

import io
from functools import partial
from typing import Any
from urllib.parse import quote

from data_prep.storage.failures import PermanentError, with_retries

SKIPPED_BYTES = 1 << 18  # a shorter seek forward reads over the gap instead of a new request
RETRIES = 4
# Number of bytes that are requested after a response broke off. aiohttp discards what it received
# of such a response, so each further failure divides the number; each complete range doubles it.
RANGE_BYTES = 1 << 18
RANGE_DIVISOR = 4
TIMEOUT_SECONDS = 30.0  # maximum time without receiving a byte
URL_CHARACTERS = "/%?&=#+,;:@~!$'()*"  # not percent-encoded


def web_file_system() -> Any:
    """Returns fsspec's file system of http and https URLs."""
    import aiohttp
    import fsspec

    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=TIMEOUT_SECONDS, sock_read=TIMEOUT_SECONDS
    )
    # Compression would make the length of a file differ from its Content-Length.
    options = {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}
    return fsspec.filesystem("http", client_kwargs=options)


def percent_encoded(url: str) -> str:
    """Encodes the characters that a request's path and query must not contain as %XX."""
    start = url.find("/", len("https://"))
    return url if start < 0 else url[:start] + quote(url[start:], safe=URL_CHARACTERS)


class WebFile(io.RawIOBase):
    """The body of an http or https URL; seekable if the server supports range requests.

    Args:
        url: URL of the file; redirects are followed.
        file_system: fsspec's file system for the URL.
        path: path of the file in the file system.

    Raises:
        FileNotFoundError: if the server has no such file.
        PermissionError: if the server denies access.
        OSError: if the server cannot be reached, or answers with another error in every attempt.
    """

    def __init__(self, url: str, file_system: Any, path: str):
        super().__init__()
        self.url = url
        self._files = file_system
        self._path = path
        self._position = 0
        self._range_bytes: int | None = None  # bytes of the next request; None: to the end
        self._range_end: int | None = None  # where the open stream ends; None: with the file
        self.num_bytes: int | None = None
        self._stream: Any = with_retries(url, self._request, retries=RETRIES)
        headers = self._stream.r.headers
        length = headers.get("Content-Length")
        self.num_bytes = int(length) if length is not None else None
        self._tag = headers.get("ETag", "")

    def _request(self) -> Any:
        """Opens a stream at the current position."""
        headers = {}
        end = None
        if self._range_bytes is not None and self.num_bytes is not None:
            end = min(self._position + self._range_bytes, self.num_bytes)
        if self._position or end is not None:
            headers["Range"] = f"bytes={self._position}-{'' if end is None else end - 1}"
            if self._tag and not self._tag.startswith("W/"):
                headers["If-Range"] = self._tag
        # With any given size, fsspec does not send a separate request to find the size.
        stream = self._files.open(self._path, block_size=0, size=1, headers=headers)
        if self._position and stream.r.status != 206:
            stream.close()
            raise PermanentError(
                f"{self.url}: expected HTTP status 206 for the bytes from {self._position}, found "
                f"{stream.r.status}: the server does not support range requests, or the file has "
                "changed; download it and use its local path"
            )
        self._range_end = end if stream.r.status == 206 else None
        return stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.num_bytes is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a position; a new request, if needed, is sent by the next read."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}[whence]
        if start is None:
            raise io.UnsupportedOperation(f"{self.url}: the server does not report the length")
        target = start + offset
        if self._stream is not None and 0 <= target - self._position <= SKIPPED_BYTES:
            while self._position < target and self.read(target - self._position):
                pass
        if target != self._position:
            self._close_stream()
            self._position = target
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Reads into a buffer; resumes after a broken connection."""
        if self.num_bytes is not None and self._position >= self.num_bytes:
            return 0
        content = with_retries(self.url, partial(self._read, len(buffer)), retries=RETRIES)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def _read(self, num_bytes: int) -> bytes:
        if self._range_bytes is not None and self._position == self._range_end:
            self._close_stream()
            self._range_bytes *= 2
        if self._stream is None:
            self._stream = self._request()
        try:
            content = self._stream.read(num_bytes)
            if not content and self.num_bytes is not None:
                raise ConnectionError(f"the response ended early, at byte {self._position}")
            return content
        except BaseException:
            self._close_stream()
            known = self._range_bytes
            self._range_bytes = max(known // RANGE_DIVISOR, 1) if known else RANGE_BYTES
            raise

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = self._range_end = None

    def close(self) -> None:
        if not self.closed and hasattr(self, "_stream"):
            self._close_stream()
        super().close()
