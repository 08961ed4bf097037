"""Cache folder of downloads, which ensures that each URL is fetched only once.

    ab/ab12...          body of the URL with this sha256, unless it was deleted
    ab/ab12...json      record of the outcome with its checksum, written after the body
    urls.lock           one byte is locked for each URL that is being fetched
    hosts.lock          one byte is locked for each open connection to a host

Bodies and records are written without a temporary name or fsync. A kill, a power failure or a bad
disk may damage them. Then a record does not match its CRC32, or a body does not match its sha256,
and the URL is fetched again.

The locks are POSIX locks of single bytes. The system releases them when a process dies, and they do
not need one file each. On a file system without locks, processes may fetch a URL twice, and each
process counts its connections to a host separately.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

from data_prep.errors import RunError
from data_prep.storage.sealed import (
    DamagedFileError,
    check_types,
    read_sealed_row,
    to_sealed_row,
)

log = logging.getLogger(__name__)

POLL_SECONDS = 0.02  # interval between attempts to take a lock that another process holds


class DownloadsEnded(Exception):
    """The downloader was closed during an operation."""


@dataclass(frozen=True)
class FetchRecord:
    """The outcome of fetching a URL."""

    reason: str | None = None  # reason for a missing body; None if there is a body
    detail: str = ""
    is_transient: bool = False
    status: int | None = None
    num_bytes: int = 0
    sha256: str = ""
    max_bytes: int = 0  # limit in effect during the download
    time: float = 0.0  # end of the download, in seconds since the epoch


RECORD_TYPES = get_type_hints(FetchRecord)


def parse_record(content: bytes) -> FetchRecord:
    """Parses the content of a record.

    Raises:
        DamagedFileError: if it is damaged.
    """
    values = read_sealed_row(content.removesuffix(b"\n"))
    if unknown := values.keys() - RECORD_TYPES.keys():
        raise DamagedFileError(f"unknown key {min(unknown)!r}")
    check_types(values, RECORD_TYPES, optional=RECORD_TYPES)
    return FetchRecord(**values)


class DownloadCache:
    """Records, bodies and locks of one folder; at most one instance per process.

    Args:
        folder: folder of the cache, created if it is missing.
        closed: event that ends all waits for locks.
    """

    def __init__(self, folder: Path, *, closed: threading.Event):
        self.folder = folder
        self._made_folders: set[str] = set()
        with self.disk_errors():
            folder.mkdir(parents=True, exist_ok=True)
            self._url_locks = ByteLocks(folder / "urls.lock", closed=closed)
            self._host_locks = ByteLocks(folder / "hosts.lock", closed=closed)

    def close(self) -> None:
        """Closes the lock files."""
        self._url_locks.close()
        self._host_locks.close()

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Converts disk errors to RunError; FileNotFoundError is not converted.

        Raises:
            RunError: if the disk fails; the message includes the folder and a remedy.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RunError(
                f"{error.filename or self.folder}: cannot store downloads: "
                f"{error.strerror or error}; free "
                "space or repair the disk, and run the same command again: finished downloads are "
                "kept"
            ) from error

    def body_path(self, url: str) -> str:
        """Returns the path of a URL's body; only the holder of the URL's lock may write it."""
        name = _digest(url).hex()
        folder = f"{self.folder}/{name[:2]}"
        if name[:2] not in self._made_folders:
            with self.disk_errors():
                os.makedirs(folder, exist_ok=True)  # noqa: PTH103
            self._made_folders.add(name[:2])
        return f"{folder}/{name}"

    def has_body(self, url: str) -> bool:
        """Returns True if the body of a URL exists."""
        return os.path.exists(self.body_path(url))  # noqa: PTH110 - in a hot path

    def read_record(self, url: str) -> FetchRecord | None:
        """Reads the record of a URL; None if it is missing or damaged."""
        content = self._read(f"{self.body_path(url)}.json")
        try:
            return None if content is None else parse_record(content)
        except DamagedFileError:
            return None

    def read_body(self, url: str, record: FetchRecord) -> bytes | None:
        """Reads the body of a URL; None if it is missing or differs from its record."""
        content = self._read(self.body_path(url))
        if content is None or hashlib.sha256(content).hexdigest() != record.sha256:
            return None
        return content

    def _read(self, path: str) -> bytes | None:
        try:
            with self.disk_errors(), open(path, "rb") as file:  # noqa: PTH123
                return file.read()
        except FileNotFoundError:
            return None

    def write_record(self, url: str, record: FetchRecord) -> None:
        """Writes the record of a URL, after its body."""
        if record.reason is not None:
            self.forget_body(url)
        content = to_sealed_row(vars(record))
        with self.disk_errors(), open(f"{self.body_path(url)}.json", "w") as file:  # noqa: PTH123
            file.write(content)

    def forget_body(self, url: str) -> None:
        """Deletes the body of a URL, if it exists."""
        with contextlib.suppress(FileNotFoundError), self.disk_errors():
            os.unlink(self.body_path(url))  # noqa: PTH108

    def url_lock(self, url: str) -> AbstractContextManager[None]:
        """Returns the lock of a URL, which is exclusive among all threads and processes."""
        return self._url_locks.hold([_place(url)])

    def host_slot(self, host: str, *, num_slots: int) -> AbstractContextManager[None]:
        """Returns the lock of one of `num_slots` connections to a host, shared by all processes."""
        first = _place(host)
        return self._host_locks.hold(range(first, first + num_slots))


class ByteLocks:
    """Locks of single bytes of a file, between threads and between processes.

    Args:
        path: lock file, created if it is missing; always empty.
        closed: event that ends all waits for locks.
    """

    def __init__(self, path: Path, *, closed: threading.Event):
        self._path = path
        self._closed = closed
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        # Bytes held by threads of this process, which the system does not distinguish.
        self._held: set[int] = set()
        self._changed = threading.Condition()
        self._has_warned = False

    def close(self) -> None:
        """Closes the lock file, which releases its locks."""
        os.close(self._descriptor)

    @contextmanager
    def hold(self, places: Sequence[int]) -> Iterator[None]:
        """Waits until one of these bytes is unlocked, and holds its lock.

        Raises:
            DownloadsEnded: if the downloader was closed in the meantime.
        """
        with self._changed:
            while (held := self._try(places)) is None:
                self._changed.wait(POLL_SECONDS * random.uniform(0.5, 1.5))
                if self._closed.is_set():
                    raise DownloadsEnded
        try:
            yield
        finally:
            with self._changed:
                self._held.remove(held)
                self._lock(held, fcntl.LOCK_UN)
                self._changed.notify_all()

    def _try(self, places: Sequence[int]) -> int | None:
        for place in places:
            if place not in self._held and self._lock(place, fcntl.LOCK_EX | fcntl.LOCK_NB):
                self._held.add(place)
                return place
        return None

    def _lock(self, place: int, kind: int) -> bool:
        try:
            fcntl.lockf(self._descriptor, kind, 1, place)
        except (BlockingIOError, PermissionError):  # another process holds it
            return False
        except OSError as error:  # some network file systems do not support locks
            if not self._has_warned:
                message = "%s: cannot be locked (%s); run one process at a time"
                log.warning(message, self._path, error)
                self._has_warned = True
        return True


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _place(name: str) -> int:
    return int.from_bytes(_digest(name)[:8], "big") >> 2  # offsets in files have 63 bits
