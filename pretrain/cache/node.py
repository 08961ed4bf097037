"""Keeps a node's shard cache ahead of its ranks: one of them fetches, all say how far they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.subset import KeptSamples
from pretrain.cache.prefetch import ShardPrefetcher, check_cache, remote_sources
from pretrain.cache.shard_cache import ShardCache
from pretrain.sampling.order import SourceOrder, lanes_of_rank


class NodeShare:
    """What the ranks of one machine carry together.

    Args:
        rank: this process's number.
        ranks: of this machine, with this one.
        world_size: number of processes.
        lanes: number of lanes.
    """

    def __init__(self, rank: int, *, ranks: Sequence[int], world_size: int, lanes: int) -> None:
        self.rank = rank
        self.ranks = sorted(ranks)
        first, last = (
            lanes_of_rank(each, world_size=world_size, lanes=lanes)
            for each in (self.ranks[0], self.ranks[-1])
        )
        self.lanes = range(first.start, last.stop)

    @property
    def is_fetching(self) -> bool:
        """Whether this rank fetches for the machine."""
        return self.rank == self.ranks[0]

    def check_neighbours(self) -> None:
        """
        Raises:
            InputError: ranks of other machines come between those of this one.
        """
        if self.ranks != list(range(self.ranks[0], self.ranks[-1] + 1)):
            raise InputError(
                f"this machine has the ranks {self.ranks}: datasets behind URLs need neighbouring "
                "ranks on each machine; start with srun --distribution=block, or with torchrun"
            )


class ReadsSteps(Protocol):
    """What is read ahead of: a StepDataset."""

    cache: ShardCache | None
    node: NodeShare

    @property
    def sources(self) -> list[tuple[SourceOrder, KeptSamples]]: ...

    def lane_positions(self, step: int) -> list[np.ndarray]: ...


def check_room(dataset: ReadsSteps) -> None:
    """Checks, before a run, that its node's cache can hold what is read at a time.

    Raises:
        InputError: two windows of every lane do not fit, or ranks do not lie side by side.
    """
    if dataset.cache is not None and remote_sources(dataset.sources):
        dataset.node.check_neighbours()
        check_cache(dataset.cache, dataset.sources, lanes=dataset.node.lanes)


class Progress:
    """How far a rank has read, for whoever fetches for its machine.

    Args:
        dataset: what is read.
        prefetcher: of this process, if it is the one that fetches.
    """

    def __init__(self, dataset: ReadsSteps, prefetcher: ShardPrefetcher | None) -> None:
        self._cache, self._rank = dataset.cache, dataset.node.rank
        self._prefetcher = prefetcher

    def publish(self, step: int) -> None:
        """Says that everything before a step has been read.

        Raises:
            OSError: shards cannot be fetched ahead any more.
        """
        if self._cache is not None:
            self._cache.publish_progress(self._rank, step)
        if self._prefetcher is not None:
            self._prefetcher.check()


@contextmanager
def fetching_ahead(dataset: ReadsSteps, *, first_step: int) -> Iterator[Progress]:
    """Fetches shards before they are read, in the one process of each machine that is to do it.

    To be entered by the process that reads, or by the parent of those that do: the libraries of
    remote file systems do not survive a fork.
    """
    if dataset.cache is None or not dataset.node.is_fetching:
        yield Progress(dataset, None)
        return
    lanes = dataset.node.lanes
    prefetcher = ShardPrefetcher(
        dataset.cache,
        sources=dataset.sources,
        lanes=lanes,
        ranks=dataset.node.ranks,
        positions_at=lambda step: [
            column[lanes.start : lanes.stop] for column in dataset.lane_positions(step)
        ],
    )
    prefetcher.start(first_step)
    try:
        yield Progress(dataset, prefetcher)
    finally:
        prefetcher.close()
