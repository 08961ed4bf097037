"""Prefetching of the shards of a node's current and next windows.

One process of each node runs the prefetcher next to the loaders, which publish their progress:

    1. the least step of the node's ranks gives the position of every lane in every source;
    2. when a lane enters another window, the next uses of all shards are computed
       (cache.schedule), and written to a file for eviction (cache.eviction);
    3. threads fetch missing shards, the one needed first at first. Shards that no current or next
       window needs are evicted for them, the one needed last at first.

A loader that needs a shard earlier fetches it by itself. Without the prefetcher, runs are only
slower.
"""

from __future__ import annotations

import copy
import logging
import math
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.manifest import ManifestRow
from data_prep.shards.sample import BadShardError
from data_prep.shards.subset import KeptSamples
from pretrain.cache.eviction import NoRoomError
from pretrain.cache.remote_shards import RemoteShards
from pretrain.cache.schedule import NEVER, ShardUses, bytes_of_two_windows, shard_uses
from pretrain.cache.shard_cache import ShardCache
from pretrain.sampling.order import SourceOrder

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_CLOSE = 5.0  # longest wait for a running download
# Steps over which the pace of a source is measured, to express next uses in steps.
STEPS_OF_PACE = 1024
EPOCHS_CHECKED = 2


@dataclass(frozen=True)
class RemoteSource:
    """A source whose shards come through the cache."""

    number: int  # index among all sources
    order: SourceOrder
    shards: RemoteShards
    manifest: list[ManifestRow]

    @cached_property
    def number_of(self) -> dict[str, int]:
        """Index of each shard, by its name in the cache."""
        return {self.shards.name_of(row): number for number, row in enumerate(self.manifest)}

    @property
    def shard_bytes(self) -> np.ndarray:
        """int64 [shards], bytes of their files."""
        return np.array([row.tar_bytes + row.index_bytes for row in self.manifest], dtype=np.int64)


@dataclass(frozen=True)
class WantedShard:
    """A shard of a current or next window."""

    needed_in: float  # steps until it is needed
    name: str  # its name in the cache
    shards: RemoteShards
    row: ManifestRow


def remote_sources(sources: Sequence[tuple[SourceOrder, KeptSamples]]) -> list[RemoteSource]:
    """Returns the sources that are read through the cache; the others are read in place.

    Each gets a copy of its order, because other threads change the original's tables.
    """
    return [
        RemoteSource(
            number, copy.copy(order), samples.dataset.fetch_shard, samples.dataset.manifest
        )
        for number, (order, samples) in enumerate(sources)
        if isinstance(samples.dataset.fetch_shard, RemoteShards)
    ]


# -------------------------------------------------------------------------------- before the run


def check_cache(
    cache: ShardCache, sources: Sequence[tuple[SourceOrder, KeptSamples]], *, lanes: range
) -> None:
    """Checks that two windows of all lanes of this node fit into the cache.

    Args:
        cache: cache of this node.
        sources: order and samples of each source.
        lanes: lanes that the ranks of this node carry.

    Raises:
        InputError: if they do not fit, with the numbers.
    """
    needed = {
        source.order.name: max(
            bytes_of_two_windows(source.order, epoch, lanes=lanes, shard_bytes=source.shard_bytes)
            for epoch in range(EPOCHS_CHECKED)
        )
        for source in remote_sources(sources)
    }
    allowed = cache.shards.max_bytes
    reachable = shutil.disk_usage(cache.shards.folder).free + cache.shards.used_bytes()
    if sum(needed.values()) <= min(allowed, reachable):
        return
    by_source = ", ".join(f"{name} {num_bytes / 1e9:.6g} GB" for name, num_bytes in needed.items())
    window = max(source.order.window for source in remote_sources(sources))
    raise InputError(
        f"{cache.folder}: expected room for two windows of loading.window={window} samples in each "
        f"of the {len(lanes)} lanes of this node: {sum(needed.values()) / 1e9:.6g} GB "
        f"({by_source}); the cache may take {allowed / 1e9:.6g} GB, and the disk has "
        f"{reachable / 1e9:.6g} GB for it; set loading.window lower, raise "
        "loading.cache.max_gigabytes, set loading.cache.folder to a larger disk, or start on more "
        "nodes"
    )


# -------------------------------------------------------------------------------- during the run


class ShardPrefetcher:
    """Threads that fetch shards ahead for all ranks of a node.

    Args:
        cache: cache of this node.
        sources: order and samples of each source; sources that are read in place are ignored.
        lanes: lanes that the ranks of this node carry.
        ranks: ranks of this node.
        positions_at: maps a step to [sources] int64 [lanes], the samples that each of the lanes
            drew before this step.
    """

    def __init__(
        self,
        cache: ShardCache,
        *,
        sources: Sequence[tuple[SourceOrder, KeptSamples]],
        lanes: range,
        ranks: Sequence[int],
        positions_at: Callable[[int], Sequence[np.ndarray]],
    ) -> None:
        self.cache = cache
        self.sources = remote_sources(sources)
        self.lanes = lanes
        self.ranks = list(ranks)
        self.positions_at = positions_at
        self._windows: list[np.ndarray] = []
        self._wanted: list[WantedShard] = []
        self._downloading: set[str] = set()
        self._bad: set[str] = set()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._is_closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, first_step: int = 0) -> None:
        """Starts fetching for a run that begins at a step; call it before the loaders start.

        It publishes this step for all ranks of the node, over what an earlier run published.
        """
        for rank in self.ranks:
            self.cache.publish_progress(rank, first_step)
        if not self.sources:
            return
        targets = [self._plan_again_and_again]
        targets += [self._fetch_again_and_again] * self.cache.settings.num_downloads
        for target in targets:
            thread = threading.Thread(target=self._run, args=(target,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Stops fetching."""
        self._is_closed.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(SECONDS_TO_CLOSE)

    def check(self) -> None:
        """Raises the error that ended fetching, if there was one.

        Raises:
            OSError: if a download failed in spite of retries; nothing more is fetched.
        """
        if self._error is not None:
            raise self._error

    def _run(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:  # `check` raises it in the training thread
            self._error = self._error or error
            self._is_closed.set()
            with self._changed:
                self._changed.notify_all()

    # --------------------------------------------------------------------------------- planning

    def _plan_again_and_again(self) -> None:
        last_step = -1
        while not self._is_closed.wait(0 if last_step < 0 else SECONDS_BETWEEN_LOOKS):
            step = self.cache.least_progress(self.ranks)
            if step != last_step:
                self._plan(step)
                last_step = step

    def _plan(self, step: int) -> None:
        positions = self.positions_at(step)
        windows = [_windows_at(s.order, positions[s.number]) for s in self.sources]
        if self._windows and all(map(np.array_equal, windows, self._windows)):
            return
        later = self.positions_at(step + STEPS_OF_PACE)
        schedule: dict[str, float] = {}
        wanted: list[WantedShard] = []
        held = self.cache.shards.held_names()
        for source in self.sources:
            start = positions[source.number]
            uses = shard_uses(source.order, start, lanes=self.lanes)
            steps = _in_steps(uses, later[source.number] - start)
            _add_shards(source, uses, steps, held=held, schedule=schedule, wanted=wanted)
        self.cache.shards.write_schedule(schedule)
        wanted.sort(key=lambda shard: shard.needed_in)
        with self._changed:
            self._windows = windows
            self._wanted = [w for w in wanted if w.name not in self._bad]
            self._changed.notify_all()

    # --------------------------------------------------------------------------------- fetching

    def _fetch_again_and_again(self) -> None:
        while (wanted := self._next_wanted()) is not None:
            try:
                wanted.shards(wanted.row, needed_in=wanted.needed_in)
            except NoRoomError as error:  # tried again when a lane enters another window
                log.debug("%s", error)
            except BadShardError as error:
                log.warning("%s", error)
                self._bad.add(wanted.name)
            finally:
                with self._changed:
                    self._downloading.discard(wanted.name)

    def _next_wanted(self) -> WantedShard | None:
        """Waits for wanted shards, and returns the one needed first; None at the end."""
        with self._changed:
            while not self._is_closed.is_set():
                while self._wanted:
                    wanted = self._wanted.pop(0)
                    if wanted.name not in self._downloading:
                        self._downloading.add(wanted.name)
                        return wanted
                self._changed.wait()
        return None


def _windows_at(order: SourceOrder, positions: np.ndarray) -> np.ndarray:
    """int64 [2, lanes]: epoch and window of each lane."""
    epochs, indices = np.divmod(positions, order.lane_length)
    return np.stack([epochs, indices // order.window])


def _in_steps(uses: ShardUses, given: np.ndarray) -> np.ndarray:
    """Float [shards]: steps until each shard is needed, at the pace of the next steps.

    Infinite if a shard is not needed, or its source is not read.

    Args:
        given: int64 [lanes], samples that each lane draws in the next STEPS_OF_PACE steps.
    """
    pace = float(given.mean()) / STEPS_OF_PACE
    if pace == 0:
        return np.full(len(uses.next_uses), math.inf)
    return np.where(uses.next_uses == NEVER, math.inf, uses.next_uses / pace)


def _add_shards(
    source: RemoteSource,
    uses: ShardUses,
    steps: np.ndarray,
    *,
    held: set[str],
    schedule: dict[str, float],
    wanted: list[WantedShard],
) -> None:
    """Adds a source's shards to the schedule, and the missing ones of its windows to `wanted`.

    Two sources may share a dataset: then the earlier use counts.
    """
    is_wanted = (uses.is_current | uses.is_next) & np.isfinite(steps)
    named = set()
    for number in np.flatnonzero(is_wanted).tolist():
        row = source.manifest[number]
        name = source.shards.name_of(row)
        named.add(name)
        if not source.shards.is_here(row):
            wanted.append(WantedShard(float(steps[number]), name, source.shards, row))
    for name in (held | named) & source.number_of.keys():
        needed_in = float(steps[source.number_of[name]])
        schedule[name] = min(needed_in, schedule.get(name, math.inf))
