"""A file on a web server that the user names as input: read in one stream, or piece by piece.

Media that a manifest names are fetched by media_download instead, which asks for permission.
"""

from __future__ import annotations

import io
from typing import Any

SKIPPED_BYTES = 1 << 18  # shorter ways forward are read over instead of asking anew
TIMEOUT_SECONDS = 30.0
ATTEMPTS = 5


class WebFile(io.RawIOBase):
    """The body of one http or https address, which can seek where the server knows ranges.

    Args:
        url: where it is; redirects are followed.

    Raises:
        FileNotFoundError: the server has no such file.
        PermissionError: the server does not give it.
        OSError: the server cannot be reached, or answers with another error.
    """

    def __init__(self, url: str):
        import urllib3

        super().__init__()
        self.url = url
        self._pool = urllib3.PoolManager(
            retries=urllib3.Retry(ATTEMPTS, status_forcelist=(429, 500, 502, 503, 504)),
            timeout=TIMEOUT_SECONDS,
        )
        self._position = 0
        self._response = self._request()
        length = self._response.headers.get("Content-Length")
        self.num_bytes = int(length) if length is not None else None
        self._tag = self._response.headers.get("ETag")

    def _request(self) -> Any:
        import urllib3

        headers = {"Accept-Encoding": "identity"}
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
            if self._tag and not self._tag.startswith("W/"):
                headers["If-Range"] = self._tag
        try:
            response = self._pool.request("GET", self.url, headers=headers, preload_content=False)
        except urllib3.exceptions.HTTPError as error:
            raise OSError(f"{self.url}: {error}") from None
        if response.status in (404, 410):
            raise FileNotFoundError(f"{self.url}: the server answers {response.status}")
        if response.status in (401, 403, 451):
            raise PermissionError(f"{self.url}: the server answers {response.status}")
        if response.status != (206 if self._position else 200):
            wanted = f"the bytes from {self._position}" if self._position else "the file"
            raise OSError(
                f"{self.url}: expected {wanted}, the server answers {response.status}; it gives no "
                "parts of files, or the file has changed: download it and give its local path"
            )
        return response

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.num_bytes is not None

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.num_bytes}[whence]
        if start is None:
            raise io.UnsupportedOperation(f"{self.url}: the server does not tell its size")
        target = start + offset
        if self._response is not None and 0 <= target - self._position <= SKIPPED_BYTES:
            while self._position < target and self.read(target - self._position):
                pass
        if target != self._position:
            self._let_go()
            self._position = target
        return self._position

    def readinto(self, buffer: Any) -> int:
        import urllib3

        for _ in range(ATTEMPTS):
            if self.num_bytes is not None and self._position >= self.num_bytes:
                return 0
            try:
                if self._response is None:
                    self._response = self._request()
                content = self._response.read(len(buffer))
            except (urllib3.exceptions.HTTPError, ConnectionError) as error:
                self._let_go()
                cause = error
                continue
            buffer[: len(content)] = content
            self._position += len(content)
            return len(content)
        raise OSError(f"{self.url}: broke off {ATTEMPTS} times at byte {self._position}: {cause}")

    def _let_go(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None

    def close(self) -> None:
        if not self.closed and hasattr(self, "_response"):
            self._let_go()
            self._pool.clear()
        super().close()
