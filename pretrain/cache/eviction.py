"""How much of a node's disk the cached shards take, and which of them give way.

All processes of a node use the same folder, so that the disk itself is the account: finished shards
count with the size of their files, and those under way with the size that the name of their part
says (`.00000000.tar.<bytes>.part`). A lock makes room for one shard at a time.

The order of the run is known, so that the shard whose next use is furthest away gives way (Belady
1966), as the schedule says that the node's prefetcher writes: "folder/shard" -> steps until it is
needed. Shards that it does not name, as those of other datasets, go first.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.storage.atomic import temporary_name

PART = ".part"
NUM_BYTES_PER_GIGABYTE = 10**9
SECONDS_BETWEEN_LOOKS = 0.05  # of who waits for room that downloads under way will free


class NoRoomError(OSError):
    """A shard does not fit beside those that are needed before it."""


@dataclass(frozen=True)
class HeldShard:
    """A finished shard in the cache."""

    name: str  # its dataset's folder and its own name
    num_bytes: int
    last_opened: float  # seconds since the epoch, about


@contextmanager
def locked(path: Path, *, waits: bool = True) -> Iterator[bool]:
    """Holds a lock that ends with the process that holds it; gives whether it was got.

    Between threads, too: each opens the file anew.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # also if a child has inherited it
    finally:
        os.close(descriptor)


def lock_path(shard: Path) -> Path:
    """The file that whoever fetches this shard locks; its name has no suffix."""
    return shard.with_name(f".{shard.name}.lock")


def part_name(name: str, num_bytes: int) -> str:
    """The name of a file that is under way."""
    return f".{name}.{num_bytes}{PART}"


class CacheRoom:
    """The shards below a folder, which never take more than they may.

    Args:
        folder: holds a folder for each dataset.
        max_bytes: what all shards may take; None: nearly all that the disk has free now, and what
            the shards take already.
    """

    SHARE_OF_FREE = 0.95  # the rest is for the file system, and for logs of others

    def __init__(self, folder: Path, *, max_bytes: int | None) -> None:
        self.folder = folder
        self.remove_leftovers()
        if max_bytes is None:
            free = shutil.disk_usage(folder).free
            max_bytes = int(self.SHARE_OF_FREE * (free + self.used_bytes()))
        self.max_bytes = max_bytes

    # ---------------------------------------------------------------------------------- account

    def used_bytes(self) -> int:
        """Bytes of finished shards and of those under way."""
        held, under_way = self._look()
        return sum(shard.num_bytes for shard in held) + under_way

    def held_names(self) -> set[str]:
        """Names of the finished shards."""
        return {shard.name for shard in self._look()[0]}

    def remove_leftovers(self) -> None:
        """Removes the parts of dead processes: those whose shard nobody has locked."""
        for part in self.folder.rglob(f".*{PART}"):
            shard_name = part.name[1:].rsplit(".", 3)[0]  # without .tar.<bytes>.part
            with locked(lock_path(part.with_name(shard_name)), waits=False) as is_locked:
                if is_locked:
                    part.unlink(missing_ok=True)

    def _look(self) -> tuple[list[HeldShard], int]:
        """(finished shards, bytes of those under way)"""
        sizes: dict[str, int] = {}
        last_opened: dict[str, float] = {}
        under_way = 0
        for path in _files_below(self.folder):
            if path.name.startswith("."):
                under_way += _bytes_of_part(path.name)
            elif path.suffix in (".tar", ".idx"):
                with suppress(FileNotFoundError):  # taken away since
                    status = path.stat()
                    name = str(path.relative_to(self.folder))[:-4]
                    sizes[name] = sizes.get(name, 0) + status.st_size
                    last_opened[name] = max(last_opened.get(name, 0.0), status.st_mtime)
        held = [HeldShard(name, size, last_opened[name]) for name, size in sizes.items()]
        return held, under_way

    # --------------------------------------------------------------------------------- schedule

    def write_schedule(self, needed_in: Mapping[str, float]) -> None:
        """Says in how many steps shards are needed, to all processes of the node."""
        path = self.folder / "schedule.json"
        temporary = path.with_name(temporary_name(path.name))
        temporary.write_text(json.dumps(needed_in))
        temporary.replace(path)

    def _read_schedule(self) -> dict[str, float]:
        try:
            return json.loads((self.folder / "schedule.json").read_bytes())
        except FileNotFoundError:
            return {}

    # ------------------------------------------------------------------------------------- room

    def reserve(self, parts: Sequence[Path], *, num_bytes: int, needed_in: float) -> None:
        """Makes room for the files of a shard, and their (empty) parts, which reserve it.

        Args:
            parts: paths, named by `part_name`.
            num_bytes: of all of them.
            needed_in: steps until the shard is needed: what is needed later gives way. 0: it is
                waited for, and anything gives way.

        Raises:
            NoRoomError: everything else is needed before it, or is no less than the whole room.
        """
        while True:
            with locked(self.folder / "room.lock"):
                for part in parts:  # of a process that died
                    part.unlink(missing_ok=True)
                held, under_way = self._look()
                missing = self._missing_bytes(held, under_way=under_way, wanted=num_bytes)
                if missing > 0:
                    missing -= self._evict(held, missing, needed_in=needed_in)
                if missing <= 0:
                    for part in parts:
                        part.touch()
                    return
            if needed_in > 0 or not under_way:
                raise NoRoomError(
                    f"{self.folder}: no room for a shard of {num_bytes / 1e9:.6g} GB: the cache "
                    f"may take {self.max_bytes / 1e9:.6g} GB, and the disk has "
                    f"{shutil.disk_usage(self.folder).free / 1e9:.6g} GB free; raise "
                    "loading.cache.max_gigabytes, free space, or set loading.cache.folder to a "
                    "larger disk"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.remove_leftovers()

    def _missing_bytes(self, held: Sequence[HeldShard], *, under_way: int, wanted: int) -> int:
        used = sum(shard.num_bytes for shard in held) + under_way
        over_budget = used + wanted - self.max_bytes
        return max(over_budget, wanted - shutil.disk_usage(self.folder).free)

    def _evict(self, held: Sequence[HeldShard], num_bytes: int, *, needed_in: float) -> int:
        """Takes shards away until so many bytes are free, furthest next use first; gives the bytes.

        Nothing is taken away if it would not be enough.
        """
        schedule = self._read_schedule()
        uses = {shard.name: schedule.get(shard.name, math.inf) for shard in held}
        candidates = [s for s in held if needed_in <= 0 or uses[s.name] > needed_in]
        if sum(shard.num_bytes for shard in candidates) < num_bytes:
            return 0
        freed = 0
        for shard in sorted(candidates, key=lambda s: (-uses[s.name], s.last_opened)):
            if freed >= num_bytes:
                break
            self._take_away(shard.name)
            freed += shard.num_bytes
        return freed

    def _take_away(self, name: str) -> None:
        """Readers may hold the tar open: cutting it frees its space, and its missing name tells
        them to ask for it again. An index may be mapped, so that it is never cut."""
        tar = self.folder / f"{name}.tar"
        with suppress(FileNotFoundError):
            descriptor = os.open(tar, os.O_RDWR)
            try:
                tar.unlink()
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)
        (self.folder / f"{name}.idx").unlink(missing_ok=True)


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)


def _bytes_of_part(name: str) -> int:
    """What a part reserves; 0 for other hidden files."""
    stem, _, num_bytes = name.removesuffix(PART).rpartition(".")
    return int(num_bytes) if name.endswith(PART) and stem and num_bytes.isdecimal() else 0
