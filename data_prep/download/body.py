"""Writer of a response body into a file, up to a maximum length."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from io import FileIO

from urllib3 import BaseHTTPResponse

from data_prep.download.address import DownloadError
from data_prep.download.cache import DownloadCache

CHUNK_BYTES = 65_536


class ResponseBody:
    """Writes a body into a file.

    Args:
        path: file to write.
        max_bytes: maximum length of the body, after decompression.
        cut: whether to truncate a longer body instead of rejecting it.
        cache: cache that contains the file; converts disk errors.
    """

    def __init__(self, path: str, *, max_bytes: int, cut: bool, cache: DownloadCache):
        self._path = path
        self._max_bytes = max_bytes
        self._cut = cut
        self._cache = cache
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def read(self, response: BaseHTTPResponse) -> None:
        """Reads the whole body.

        Raises:
            DownloadError: if the body is too large, ends early, or has an encoding other than
                gzip or deflate.
            RunError: if the disk is full or fails.
        """
        length = response.length_remaining
        if length is not None and length > self._max_bytes and not self._cut:
            raise self._too_large(f"Content-Length is {length}")
        chunks = _chunks(response)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            chunks = _decoded(chunks, encoding)
        with self._cache.disk_errors():
            file = open(self._path, "wb", buffering=0)  # noqa: PTH123, SIM115
        with file:
            for chunk in chunks:
                if not self._write(chunk, file):
                    return

    def _write(self, chunk: bytes, file: FileIO) -> bool:
        """Writes a chunk; returns True if more chunks are accepted."""
        room = self._max_bytes - self.num_bytes
        if len(chunk) > room and not self._cut:
            raise self._too_large("more were received")
        chunk = chunk[:room]
        self.sha256.update(chunk)
        self.num_bytes += len(chunk)
        with self._cache.disk_errors():
            unwritten = memoryview(chunk)
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        return self.num_bytes < self._max_bytes or not self._cut

    def _too_large(self, found: str) -> DownloadError:
        return DownloadError(
            "download_too_large", f"expected at most {self._max_bytes} bytes; {found}"
        )


def _chunks(response: BaseHTTPResponse) -> Iterator[bytes]:
    """Yields the body as it arrives; read1 does not block, so slow servers are detected."""
    while chunk := response.read1(CHUNK_BYTES):
        yield chunk


def _decoded(chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """Yields the decompressed body in small chunks, as a defence against decompression bombs."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise DownloadError("download_http_error", f"Content-Encoding {encoding} is not supported")
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)  # detects gzip and zlib headers
    try:
        for chunk in chunks:
            while chunk:
                yield decompressor.decompress(chunk, CHUNK_BYTES)
                chunk = decompressor.unconsumed_tail
    except zlib.error as error:
        raise DownloadError(
            "download_http_error", f"Content-Encoding {encoding}: {error}"
        ) from None
    if not decompressor.eof:
        raise DownloadError("download_http_error", f"truncated {encoding} body", is_transient=True)
