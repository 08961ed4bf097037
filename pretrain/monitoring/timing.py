"""Durations of the phases of steps on every rank, and the rank that the others wait for.

    data        waiting for the next batch
    forward     encoding the batch
    gather      computing the loss, including the exchange of features and sums among ranks
    backward    computing gradients, including their reduction
    optimizer   clipping and update, including the exchange of updated parameters
    validation, save

A late rank makes the others wait in their gather and backward phases. So the slowest rank is
determined from the phases before the first collective: data and forward.
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
    """Measures the seconds spent in each phase since the last `take`.

    A GPU runs kernels asynchronously, after the host has launched them. On a GPU, the computing
    phases are measured by CUDA events, which are read at `take`.

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
        self.data_seconds = 0.0  # total of the attempt
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the duration of the `with` block to one of PHASES."""
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
        """Returns (seconds since the last call, {phase: seconds}) and resets both."""
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
    phase: str  # phase in which this rank exceeds the mean over ranks most
    seconds: float  # duration of that phase
    mean_seconds: float  # mean duration of that phase over ranks


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


def mean_seconds(seconds_by_rank: Sequence[dict[str, float]]) -> dict[str, float]:
    """Returns the mean over ranks of each phase."""
    return {
        name: sum(each[name] for each in seconds_by_rank) / len(seconds_by_rank) for name in PHASES
    }


def slowest_rank(seconds_by_rank: Sequence[dict[str, float]]) -> SlowestRank | None:
    """Returns the rank with the most time in data and forward; None if there is only one rank."""
    if len(seconds_by_rank) < 2:
        return None
    mean = mean_seconds(seconds_by_rank)
    number = max(
        range(len(seconds_by_rank)),
        key=lambda n: sum(seconds_by_rank[n][name] for name in OWN_WORK),
    )
    phase = max(OWN_WORK, key=lambda name: seconds_by_rank[number][name] - mean[name])
    return SlowestRank(number, phase, seconds_by_rank[number][phase], mean[phase])
