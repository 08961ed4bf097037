"""Fetches the shards of the windows that a node's lanes are in, and of the next ones, in time.

One process of each node runs it, beside its loaders, which publish how far they have come:

    1. the least step of the node's ranks gives the position of every lane in every source;
    2. where a lane has entered another window, the shards that are read from there on are worked
       out, and when (shard_schedule): this is written down for whoever needs room (cache_room);
    3. threads fetch what is not there, first what is needed first; shards that no current or next
       window needs, the latest first, give way to them.

A loader that comes before it fetches by itself: without the prefetcher runs are slower, no more.
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
from pretrain.cache.schedule import NEVER, ShardUses, bytes_of_two_windows, shard_uses
from pretrain.cache.shard_cache import RemoteShards, ShardCache
from pretrain.sampling.order import SourceOrder

log = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_CLOSE = 5.0  # a download under way is not waited for any longer
# Over this many steps the pace of a source is measured: sources are compared by steps.
STEPS_OF_PACE = 1024
EPOCHS_CHECKED = 2


@dataclass(frozen=True)
class RemoteSource:
    """A source whose shards come through the cache."""

    number: int  # among all sources
    order: SourceOrder
    shards: RemoteShards
    manifest: list[ManifestRow]

    @cached_property
    def number_of(self) -> dict[str, int]:
        """The number of each shard, by its name in the cache."""
        return {self.shards.name_of(row): number for number, row in enumerate(self.manifest)}

    @property
    def shard_bytes(self) -> np.ndarray:
        """int64 [shards]: bytes of their files."""
        return np.array([row.tar_bytes + row.index_bytes for row in self.manifest], dtype=np.int64)


@dataclass(frozen=True)
class WantedShard:
    """A shard of a current or next window."""

    needed_in: float  # steps
    name: str  # in the cache
    shards: RemoteShards
    row: ManifestRow


def remote_sources(sources: Sequence[tuple[SourceOrder, KeptSamples]]) -> list[RemoteSource]:
    """Those of the sources that are read through the cache; the others are read in place.

    Each with an order of its own, whose tables no other thread changes.
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
        cache: of this node.
        sources: order and samples of each.
        lanes: that the ranks of this node carry.

    Raises:
        InputError: they do not, with the numbers.
    """
    needed = {
        source.order.name: max(
            bytes_of_two_windows(source.order, epoch, lanes=lanes, shard_bytes=source.shard_bytes)
            for epoch in range(EPOCHS_CHECKED)
        )
        for source in remote_sources(sources)
    }
    allowed = cache.room.max_bytes
    reachable = shutil.disk_usage(cache.room.folder).free + cache.room.used_bytes()
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
    """Threads that fetch ahead for all ranks of a node.

    Args:
        cache: of this node.
        sources: order and samples of each; those that are read in place are left alone.
        lanes: that the ranks of this node carry.
        ranks: of this node.
        positions_at: step -> by source, int64 [lanes]: samples of the source that each of the lanes
            has given before this step.
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
        self._under_way: set[str] = set()
        self._bad: set[str] = set()
        self._error: Exception | None = None
        self._changed = threading.Condition()
        self._is_closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self, first_step: int = 0) -> None:
        """Starts fetching for a run that begins at this step, before its loaders do.

        The node's ranks count as having come to it, whatever an earlier run has published.
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
        """
        Raises:
            OSError: what made a download fail for good; nothing more is fetched.
        """
        if self._error is not None:
            raise self._error

    def _run(self, target: Callable[[], None]) -> None:
        try:
            target()
        except Exception as error:  # `check` raises it in the thread that trains
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
        held = self.cache.room.held_names()
        for source in self.sources:
            start = positions[source.number]
            uses = shard_uses(source.order, start, lanes=self.lanes)
            steps = _in_steps(uses, later[source.number] - start)
            _note(source, uses, steps, held=held, schedule=schedule, wanted=wanted)
        self.cache.room.write_schedule(schedule)
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
            except NoRoomError as error:  # until a lane enters another window
                log.debug("%s", error)
            except BadShardError as error:
                log.warning("%s", error)
                self._bad.add(wanted.name)
            finally:
                with self._changed:
                    self._under_way.discard(wanted.name)

    def _next_wanted(self) -> WantedShard | None:
        """The shard that is needed first, once there is one; None at the end."""
        with self._changed:
            while not self._is_closed.is_set():
                while self._wanted:
                    wanted = self._wanted.pop(0)
                    if wanted.name not in self._under_way:
                        self._under_way.add(wanted.name)
                        return wanted
                self._changed.wait()
        return None


def _windows_at(order: SourceOrder, positions: np.ndarray) -> np.ndarray:
    """int64 [2, lanes]: the epoch and the window that each lane is in."""
    epochs, places = np.divmod(positions, order.lane_length)
    return np.stack([epochs, places // order.window])


def _in_steps(uses: ShardUses, given: np.ndarray) -> np.ndarray:
    """Float [shards]: steps until each shard is needed, at the pace of the coming steps; infinite
    where it is not, or where the source is not read.

    Args:
        given: int64 [lanes], samples that each lane gives in the coming STEPS_OF_PACE steps.
    """
    pace = float(given.mean()) / STEPS_OF_PACE
    if pace == 0:
        return np.full(len(uses.next_uses), math.inf)
    return np.where(uses.next_uses == NEVER, math.inf, uses.next_uses / pace)


def _note(
    source: RemoteSource,
    uses: ShardUses,
    steps: np.ndarray,
    *,
    held: set[str],
    schedule: dict[str, float],
    wanted: list[WantedShard],
) -> None:
    """Adds a source's shards to the schedule, and those of its windows that are not there to what
    is wanted. Two sources may share a dataset: the earlier use counts."""
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
