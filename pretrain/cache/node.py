"""Fetching ahead for one machine: one of its ranks fetches shards, all publish their progress."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.subset import KeptSamples
from pretrain.cache.prefetch import ShardPrefetcher, check_cache, remote_sources
from pretrain.cache.shard_cache import ShardCache
from pretrain.sampling.order import SourceOrder, lanes_of_rank
from pretrain.sampling.schedule import RunSchedule


class NodeShare:
    """The shards that the ranks of one machine read, and the cache that they share.

    Args:
        rank: this process's number.
        ranks: ranks of this machine, this one among them.
        world_size: number of processes.
        cache: this machine's cache; None if no dataset is behind a URL.
        schedule: samples of every step.
        samples: samples of all sources, in the schedule's order.
    """

    def __init__(
        self,
        rank: int,
        *,
        ranks: Sequence[int],
        world_size: int,
        cache: ShardCache | None,
        schedule: RunSchedule,
        samples: Sequence[KeptSamples],
    ) -> None:
        self.rank = rank
        self.ranks = sorted(ranks)
        first, last = (
            lanes_of_rank(each, world_size=world_size, lanes=schedule.lanes)
            for each in (self.ranks[0], self.ranks[-1])
        )
        self.lanes = range(first.start, last.stop)
        self.cache = cache
        self.schedule = schedule
        orders = [source for order in schedule.orders.values() for source in order.sources]
        self.sources: list[tuple[SourceOrder, KeptSamples]] = list(
            zip(orders, samples, strict=True)
        )

    def lane_positions(self, step: int) -> list[np.ndarray]:
        """Returns [sources] int64 [lanes], the samples that this machine's lanes drew before."""
        return [
            column[self.lanes.start : self.lanes.stop]
            for column in self.schedule.lane_positions(step)
        ]

    @property
    def is_fetching(self) -> bool:
        """Whether this rank fetches for the machine."""
        return self.rank == self.ranks[0]

    def check_neighbours(self) -> None:
        """Checks that this machine's ranks are neighbours.

        Raises:
            InputError: if ranks of other machines lie between them.
        """
        if self.ranks != list(range(self.ranks[0], self.ranks[-1] + 1)):
            raise InputError(
                f"this machine has the ranks {self.ranks}: datasets behind URLs need neighbouring "
                "ranks on each machine; start with srun --distribution=block, or with torchrun"
            )


def check_room(node: NodeShare) -> None:
    """Checks, before a run, that the machine's cache can hold what is read at a time.

    Raises:
        InputError: if two windows of every lane do not fit, or ranks do not lie side by side.
    """
    if node.cache is not None and remote_sources(node.sources):
        node.check_neighbours()
        check_cache(node.cache, node.sources, lanes=node.lanes)


class Progress:
    """Published progress of a rank, which the prefetcher of its machine follows.

    Args:
        node: shards and cache of this machine.
        prefetcher: prefetcher of this process, if it is the one that fetches.
    """

    def __init__(self, node: NodeShare, prefetcher: ShardPrefetcher | None) -> None:
        self._cache, self._rank = node.cache, node.rank
        self._prefetcher = prefetcher

    def publish(self, step: int) -> None:
        """Publishes that this rank has read everything before a step.

        Raises:
            OSError: if shards cannot be fetched ahead any more.
        """
        if self._cache is not None:
            self._cache.publish_progress(self._rank, step)
        if self._prefetcher is not None:
            self._prefetcher.check()


@contextmanager
def fetching_ahead(node: NodeShare, *, first_step: int) -> Iterator[Progress]:
    """Fetches shards before they are read, in one process of each machine.

    The process that reads must enter it, or the parent of those that read: libraries of remote
    file systems do not survive a fork.
    """
    if node.cache is None or not node.is_fetching:
        yield Progress(node, None)
        return
    prefetcher = ShardPrefetcher(
        node.cache,
        sources=node.sources,
        lanes=node.lanes,
        ranks=node.ranks,
        positions_at=node.lane_positions,
    )
    prefetcher.start(first_step)
    try:
        yield Progress(node, prefetcher)
    finally:
        prefetcher.close()
