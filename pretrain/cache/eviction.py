"""Eviction of cached shards: the size of a node's cache, and room for the next shard.

All processes of a node use the same folder, so sizes are read off the disk. A finished shard counts
with the size of its files. A download counts with the final size, which is in the name of its part
(`.00000000.tar.<bytes>.<random>.part`). A lock makes room for one shard at a time.

The order of the run is known, so the shard whose next use is furthest away is evicted first (Belady
1966). The node's prefetcher writes this schedule: "folder/shard" -> steps until it is needed.
Shards that the schedule does not name, such as those of other datasets, are evicted before them.
"""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.storage.atomic import temporary_name
from data_prep.storage.sealed import (
    DamagedFileError,
    check_types,
    read_sealed_row,
    to_sealed_row,
    warn_once,
)
from pretrain.cache.files import (
    bytes_of_part,
    lock_path,
    locked,
    remove,
    remove_folder,
    shard_of_part,
)

log = logging.getLogger(__name__)

NUM_BYTES_PER_GIGABYTE = 10**9
SCHEDULE_FILE = "schedule.json"
SECONDS_BETWEEN_LOOKS = 0.05  # while waiting for downloads to finish, so that they can be evicted


class NoRoomError(OSError):
    """A shard does not fit next to those that are needed before it."""


@dataclass(frozen=True)
class HeldShard:
    """A finished shard in the cache."""

    name: str  # "<folder of its dataset>/<shard>"
    num_bytes: int
    last_opened: float  # approximate, in seconds since the epoch


class CachedShards:
    """Shards below a folder, evicted so that they never take more than a number of bytes.

    Args:
        folder: folder that holds one folder per dataset.
        max_bytes: most bytes of all shards; None for nearly all that the disk has free now, plus
            the bytes that shards take already.
    """

    FRACTION_OF_FREE = 0.95  # the rest is for the file system, and for logs of other programs

    def __init__(self, folder: Path, *, max_bytes: int | None) -> None:
        self.folder = folder
        self.remove_leftovers()
        if max_bytes is None:
            free = shutil.disk_usage(folder).free
            max_bytes = int(self.FRACTION_OF_FREE * (free + self.used_bytes()))
        self.max_bytes = max_bytes

    # ------------------------------------------------------------------------------------ sizes

    def used_bytes(self) -> int:
        """Returns the bytes of finished shards and of downloads."""
        held, downloading = self._look()
        return sum(shard.num_bytes for shard in held) + downloading

    def held_names(self) -> set[str]:
        """Returns the names of the finished shards."""
        return {shard.name for shard in self._look()[0]}

    def remove_leftovers(self) -> None:
        """Removes the parts of dead processes, whose shards are not locked."""
        for part in _files_below(self.folder):
            shard_name = shard_of_part(part.name)
            if shard_name is not None:
                with locked(lock_path(part.with_name(shard_name)), waits=False) as is_locked:
                    if is_locked:
                        remove(part)

    def remove_parts_of(self, shard: Path) -> None:
        """Removes the parts of a shard (a path without suffix), which the caller has locked."""
        for part in list(shard.parent.glob(".*.part")):
            if shard_of_part(part.name) == shard.name:
                remove(part)

    def _look(self) -> tuple[list[HeldShard], int]:
        """(finished shards, bytes of downloads)"""
        sizes: dict[str, int] = {}
        last_opened: dict[str, float] = {}
        downloading = 0
        for path in _files_below(self.folder):
            if path.name.startswith("."):
                downloading += bytes_of_part(path.name)
            elif path.suffix in (".tar", ".idx"):
                with suppress(FileNotFoundError):  # evicted meanwhile
                    status = path.stat()
                    name = str(path.relative_to(self.folder))[:-4]
                    sizes[name] = sizes.get(name, 0) + status.st_size
                    last_opened[name] = max(last_opened.get(name, 0.0), status.st_mtime)
        held = [HeldShard(name, size, last_opened[name]) for name, size in sizes.items()]
        return held, downloading

    # --------------------------------------------------------------------------------- schedule

    def write_schedule(self, needed_in: Mapping[str, float]) -> None:
        """Publishes the steps until shards are needed, for all processes of the node."""
        path = self.folder / SCHEDULE_FILE
        temporary = path.with_name(temporary_name(path.name))
        temporary.write_text(to_sealed_row({"needed_in": needed_in}))
        remove_folder(path)
        temporary.replace(path)

    def _read_schedule(self) -> dict[str, float]:
        """Reads the schedule; a missing or damaged one counts as empty until the next is written.

        It decides which shards are evicted, and thus which ones are fetched again, nothing else.
        """
        path = self.folder / SCHEDULE_FILE
        try:
            return parse_schedule(path.read_bytes())
        except FileNotFoundError:
            return {}
        except (DamagedFileError, OSError) as error:
            warn_once(log, f"{path}: not readable, shards are evicted without it: {error}")
            return {}

    # ------------------------------------------------------------------------------------- room

    def reserve(self, parts: Sequence[Path], *, num_bytes: int, needed_in: float) -> None:
        """Makes room for the files of a shard, and reserves it with their empty parts.

        Args:
            parts: paths, named by `new_part_name`.
            num_bytes: bytes of all these files.
            needed_in: steps until the shard is needed; only shards that are needed later are
                evicted. 0 if a reader waits for it: then any shard may be evicted.

        Raises:
            NoRoomError: if all other shards are needed before it, or it is larger than the cache.
        """
        while True:
            with locked(self.folder / "room.lock"):
                held, downloading = self._look()
                missing = self._missing_bytes(held, downloading=downloading, wanted=num_bytes)
                if missing > 0:
                    missing -= self._evict(held, missing, needed_in=needed_in)
                if missing <= 0:
                    for part in parts:
                        part.touch()
                    return
            if needed_in > 0 or not downloading:
                raise NoRoomError(
                    f"{self.folder}: no room for a shard of {num_bytes / 1e9:.6g} GB: the cache "
                    f"may take {self.max_bytes / 1e9:.6g} GB, and the disk has "
                    f"{shutil.disk_usage(self.folder).free / 1e9:.6g} GB free; raise "
                    "loading.cache.max_gigabytes, free space, or set loading.cache.folder to a "
                    "larger disk"
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.remove_leftovers()

    def _missing_bytes(self, held: Sequence[HeldShard], *, downloading: int, wanted: int) -> int:
        used = sum(shard.num_bytes for shard in held) + downloading
        over_budget = used + wanted - self.max_bytes
        return max(over_budget, wanted - shutil.disk_usage(self.folder).free)

    def _evict(self, held: Sequence[HeldShard], num_bytes: int, *, needed_in: float) -> int:
        """Evicts shards, furthest next use first, until so many bytes are free.

        Returns the bytes that were freed. Nothing is evicted if it would not be enough.
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
            self.remove(shard.name)
            freed += shard.num_bytes
        return freed

    def remove(self, name: str) -> None:
        """Removes a shard's files while readers may hold them open.

        Truncating the tar frees its space at once. Readers find its name missing, and fetch the
        shard again.
        """
        tar = self.folder / f"{name}.tar"
        remove_folder(tar)
        with suppress(FileNotFoundError):
            descriptor = os.open(tar, os.O_RDWR)
            try:
                tar.unlink()
                os.ftruncate(descriptor, 0)
            finally:
                os.close(descriptor)
        remove(self.folder / f"{name}.idx")


def parse_schedule(content: bytes) -> dict[str, float]:
    """Parses the content of a schedule.

    Raises:
        DamagedFileError: if it is damaged.
    """
    row = read_sealed_row(content.rstrip(b"\n"))
    check_types(row, {"needed_in": dict[str, float]})
    return row["needed_in"]


def _files_below(folder: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(folder):
        for name in names:
            yield Path(parent, name)
