"""Durations of the phases of steps, on every rank, and the rank that the others wait for.

    data        waiting for the next batch
    forward     encoding it
    gather      the loss, with the exchange of features and sums among ranks
    backward    gradients, with their exchange
    optimizer   clipping and update, with the exchange of updated parameters
    validation, save

A late rank makes the others wait in their gather and backward phases. So the slowest rank is found
from the phases before the ranks meet: data and forward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pretrain.distributed.collectives import rank, sum_over_ranks, world_size

PHASES = ("data", "forward", "gather", "backward", "optimizer", "validation", "save")
OWN_WORK = ("data", "forward")
ON_DEVICE = ("forward", "gather", "backward", "optimizer")


class PhaseTimer:
    """Seconds spent in each phase since the last `take`.

    A GPU runs behind the host, which only launches its kernels. There the computing phases are
    measured by events in the GPU's queue, which are read at `take`.

    Args:
        device: device of the model.
        clock: returns seconds.
    """

    def __init__(
        self, device: torch.device, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._is_cuda = device.type == "cuda"
        self._clock = clock
        self._since = clock()
        self._seconds: dict[str, float] = {}
        self.data_seconds = 0.0  # in total
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time of its block to one of PHASES."""
        if self._is_cuda and name in ON_DEVICE:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        begin = self._clock()
        yield
        seconds = self._clock() - begin
        self._add(name, seconds)
        if name == "data":
            self.data_seconds += seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> tuple[float, dict[str, float]]:
        """Returns (seconds since the last call, {phase: seconds}), and restarts both."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        now = self._clock()
        taken = (now - self._since, self._seconds)
        self._since, self._seconds, self._events = now, {}, []
        return taken


@dataclass(frozen=True)
class SlowestRank:
    """The rank that the others wait for."""

    rank: int
    phase: str  # phase of its own work in which it is furthest above the mean
    seconds: float  # of that phase
    mean_seconds: float  # of that phase, over ranks


def exchange_seconds(own: dict[str, float], *, device: torch.device) -> list[dict[str, float]]:
    """Exchanges the seconds by phase; every rank must call it.

    Args:
        own: {phase: seconds} of this rank.
        device: device of the exchange.

    Returns:
        [ranks] {phase: seconds}.
    """
    table = torch.zeros(world_size(), len(PHASES), device=device)
    table[rank()] = torch.tensor([own.get(name, 0.0) for name in PHASES])
    return [dict(zip(PHASES, row, strict=True)) for row in sum_over_ranks(table).tolist()]


def mean_seconds(of_ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean over ranks of each phase."""
    return {name: sum(each[name] for each in of_ranks) / len(of_ranks) for name in PHASES}


def slowest_rank(of_ranks: Sequence[dict[str, float]]) -> SlowestRank | None:
    """Returns the rank with the longest work of its own; None if there is only one rank."""
    if len(of_ranks) < 2:
        return None
    mean = mean_seconds(of_ranks)
    number = max(range(len(of_ranks)), key=lambda n: sum(of_ranks[n][name] for name in OWN_WORK))
    phase = max(OWN_WORK, key=lambda name: of_ranks[number][name] - mean[name])
    return SlowestRank(number, phase, of_ranks[number][phase], mean[phase])
