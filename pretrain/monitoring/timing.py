"""Where the time of steps goes, on every rank, and which rank the others wait for.

    data        waiting for the next batch
    forward     encoding it
    gather      the loss, with the exchange of features and sums among ranks
    backward    gradients, with their exchange
    optimizer   clipping and update, with the exchange of what a rank has updated
    validation, save

A rank that is late makes the others wait within their gather and backward. So which one is slowest
is judged by what each does before it meets the others: data and forward.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from pretrain.distributed.collectives import rank, sum_over_ranks, world_size

PHASES = ("data", "forward", "gather", "backward", "optimizer", "validation", "save")
OWN_WORK = ("data", "forward")
ON_DEVICE = ("forward", "gather", "backward", "optimizer")


class PhaseTimer:
    """Seconds spent in each phase since the last `take`.

    A GPU works behind the host, which only starts its kernels: there the phases that compute are
    measured by events in the GPU's own queue, which are read at `take`.

    Args:
        device: of the model.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._since = time.perf_counter()
        self._seconds: dict[str, float] = {}
        self.data_seconds = 0.0  # in all
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
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self._add(name, seconds)
        if name == "data":
            self.data_seconds += seconds

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> tuple[float, dict[str, float]]:
        """(seconds since the last call, of which by phase), and begins anew."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        now = time.perf_counter()
        taken = (now - self._since, self._seconds)
        self._since, self._seconds, self._events = now, {}, []
        return taken


@dataclass(frozen=True)
class SlowestRank:
    """The rank that the others wait for."""

    rank: int
    phase: str  # of its own work, in which it is furthest above the mean
    seconds: float  # of that phase
    mean_seconds: float  # of that phase, over ranks


def exchange_seconds(own: dict[str, float], *, device: torch.device) -> list[dict[str, float]]:
    """[ranks] seconds by phase of every rank; every rank must call it.

    Args:
        own: of this rank.
        device: that ranks talk by.
    """
    table = torch.zeros(world_size(), len(PHASES), device=device)
    table[rank()] = torch.tensor([own.get(name, 0.0) for name in PHASES])
    return [dict(zip(PHASES, row, strict=True)) for row in sum_over_ranks(table).tolist()]


def mean_seconds(of_ranks: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean over ranks of each phase."""
    return {name: sum(each[name] for each in of_ranks) / len(of_ranks) for name in PHASES}


def slowest_rank(of_ranks: Sequence[dict[str, float]]) -> SlowestRank | None:
    """The rank with most work of its own; None where there is only one."""
    if len(of_ranks) < 2:
        return None
    mean = mean_seconds(of_ranks)
    number = max(range(len(of_ranks)), key=lambda n: sum(of_ranks[n][name] for name in OWN_WORK))
    phase = max(OWN_WORK, key=lambda name: of_ranks[number][name] - mean[name])
    return SlowestRank(number, phase, of_ranks[number][phase], mean[phase])
