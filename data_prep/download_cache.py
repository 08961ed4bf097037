"""The folder in which downloads are kept, so that no URL is fetched twice.

    ab/ab12...json      what became of the URL with this sha256: written last, and atomically
    ab/ab12...          its body, if there was one and it was not forgotten
    ab/ab12...part      body of a download that is under way, or that was killed
    ab/ab12...lock      held by whoever fetches this URL
    hosts/ab12...-0.lock    held while a host's place 0 is taken

Locks are flock's: the system lets go of them when a process dies. Where the file system locks
nothing, processes that share the folder may fetch a URL twice, and do not share a host's places.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from data_prep.config_file import RunError
from data_prep.shard_format import write_atomically

log = logging.getLogger(__name__)

SECONDS_BETWEEN_TRIES = 0.02


class DownloadsEnded(Exception):
    """The downloader was closed while this was under way."""


@dataclass(frozen=True)
class FetchRecord:
    """What became of a URL."""

    reason: str | None = None  # why there is no body
    detail: str = ""
    is_transient: bool = False
    status: int | None = None
    num_bytes: int = 0
    sha256: str = ""
    max_bytes: int = 0  # the limit that counted
    time: float = 0.0  # seconds since 1970, of the end


class DownloadCache:
    """Records, bodies and locks of one folder.

    Args:
        folder: is made.
        closed: whoever waits for a lock stops when it is set.
    """

    def __init__(self, folder: Path, *, closed: threading.Event):
        self.folder = folder
        self._closed = closed
        self._has_locks = True
        with self.disk_errors():
            (folder / "hosts").mkdir(parents=True, exist_ok=True)
            for number in range(256):
                (folder / f"{number:02x}").mkdir(exist_ok=True)

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Errors of the folder's disk end the run; that a file is not there is none.

        Raises:
            RunError: naming the folder and what to do.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RunError(
                f"{self.folder}: downloads cannot be kept here: {error.strerror or error}; make "
                "room or mend the disk, and run the same command again: what was fetched is kept"
            ) from error

    # ------------------------------------------------------------------------ records and bodies

    def body_path(self, url: str) -> Path:
        name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
        return self.folder / name[:2] / name

    def part_path(self, url: str) -> Path:
        return self.body_path(url).with_suffix(".part")

    def read_record(self, url: str) -> FetchRecord | None:
        """What became of the URL; None: nothing yet, or the record is damaged."""
        try:
            with self.disk_errors():
                content = self.body_path(url).with_suffix(".json").read_bytes()
            return FetchRecord(**json.loads(content))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def has_body(self, url: str) -> bool:
        return self.body_path(url).exists()

    def read_body(self, url: str, record: FetchRecord) -> bytes | None:
        """The body; None: it is gone, or a power cut has left only a part of it."""
        try:
            with self.disk_errors():
                content = self.body_path(url).read_bytes()
        except FileNotFoundError:
            return None
        return content if hashlib.sha256(content).hexdigest() == record.sha256 else None

    def keep(self, url: str, record: FetchRecord) -> None:
        """Keeps the record, and what is at part_path as the body of a URL that has one."""
        content = json.dumps(dataclasses.asdict(record)).encode()
        with self.disk_errors():
            if record.reason is None:
                self.part_path(url).replace(self.body_path(url))
            else:
                self.part_path(url).unlink(missing_ok=True)
            write_atomically(self.body_path(url).with_suffix(".json"), content)

    def forget_body(self, url: str) -> None:
        self.body_path(url).unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------- locks

    @contextmanager
    def url_lock(self, url: str) -> Iterator[None]:
        """Held by one thread of all processes at a time."""
        with self._any_lock([self.body_path(url).with_suffix(".lock")]):
            yield

    @contextmanager
    def host_place(self, host: str, *, num_places: int) -> Iterator[None]:
        """One of the places of a host, of which no more are taken at a time by all processes."""
        name = hashlib.sha256(host.encode()).hexdigest()
        paths = [self.folder / "hosts" / f"{name}-{place}.lock" for place in range(num_places)]
        with self._any_lock(paths):
            yield

    @contextmanager
    def _any_lock(self, paths: list[Path]) -> Iterator[None]:
        """Waits until one of the locks is free, and holds it.

        Raises:
            DownloadsEnded: in the meantime the downloader was closed.
        """
        if not self._has_locks:
            yield
            return
        while (held := self._try_locks(paths)) is None:
            if self._closed.wait(SECONDS_BETWEEN_TRIES * random.uniform(0.5, 1.5)):
                raise DownloadsEnded
        path, descriptor = held
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: millions of URLs leave no files
            os.close(descriptor)

    def _try_locks(self, paths: list[Path]) -> tuple[Path, int] | None:
        start = random.randrange(len(paths))
        for path in paths[start:] + paths[:start]:
            with self.disk_errors():
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if self._lock(descriptor) and _is_at(path, descriptor):
                return path, descriptor
            os.close(descriptor)
        return None

    def _lock(self, descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:  # some network file systems lock nothing
            log.warning("%s: cannot be locked (%s); run one process at a time", self.folder, error)
            self._has_locks = False
        return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file still is the one of that name, and not one that was removed."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
