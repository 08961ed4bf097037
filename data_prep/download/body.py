"""The body of a web response on its way into a file, never longer than allowed."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator
from io import FileIO

from urllib3 import BaseHTTPResponse

from data_prep.download.address import DownloadError
from data_prep.download.cache import DownloadCache

PIECE_BYTES = 65_536


class ResponseBody:
    """Writes a body into a file.

    Args:
        path: file to write.
        max_bytes: longest body, after decompression.
        cut: end a longer body there, instead of refusing it.
        cache: folder of the file, for what is said when its disk is full.
    """

    def __init__(self, path: str, *, max_bytes: int, cut: bool, cache: DownloadCache):
        self._path = path
        self._max_bytes = max_bytes
        self._cut = cut
        self._cache = cache
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def read(self, response: BaseHTTPResponse) -> None:
        """
        Raises:
            DownloadError: it is too large, ends early, or is encoded otherwise than gzip.
            RunError: the disk is full, or broken.
        """
        length = response.length_remaining
        if length is not None and length > self._max_bytes and not self._cut:
            raise self._too_large(f"{length} bytes announced")
        pieces = _pieces(response)
        encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("identity", ""):
            pieces = _decoded(pieces, encoding)
        with self._cache.disk_errors():
            file = open(self._path, "wb", buffering=0)  # noqa: PTH123, SIM115
        with file:
            for piece in pieces:
                if not self._write(piece, file):
                    return

    def _write(self, piece: bytes, file: FileIO) -> bool:
        """Whether more is wanted."""
        room = self._max_bytes - self.num_bytes
        if len(piece) > room and not self._cut:
            raise self._too_large("more came")
        piece = piece[:room]
        self.sha256.update(piece)
        self.num_bytes += len(piece)
        with self._cache.disk_errors():
            unwritten = memoryview(piece)
            while unwritten:
                unwritten = unwritten[file.write(unwritten) :]
        return self.num_bytes < self._max_bytes or not self._cut

    def _too_large(self, found: str) -> DownloadError:
        return DownloadError("download_too_large", f"at most {self._max_bytes} bytes; {found}")


def _pieces(response: BaseHTTPResponse) -> Iterator[bytes]:
    """The body as it comes: read1 gives what is there, so that slow servers are noticed."""
    while piece := response.read1(PIECE_BYTES):
        yield piece


def _decoded(pieces: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    """The decompressed body in small pieces: a bomb does not come to fill the memory."""
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise DownloadError("download_http_error", f"Content-Encoding {encoding}: not asked for")
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip's header or zlib's
    try:
        for piece in pieces:
            while piece:
                yield decompressor.decompress(piece, PIECE_BYTES)
                piece = decompressor.unconsumed_tail
    except zlib.error as error:
        raise DownloadError(
            "download_http_error", f"Content-Encoding {encoding}: {error}"
        ) from None
    if not decompressor.eof:
        raise DownloadError("download_http_error", f"{encoding} body ends early", is_transient=True)
