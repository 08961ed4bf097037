"""Values far above their recent level: a median, which spikes themselves do not move."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

NUM_NEEDED = 20  # values before there is a level


@dataclass(frozen=True)
class Spike:
    """One value far above the level."""

    step: int
    value: float
    median: float  # of the values before


class SpikeDetector:
    """A pure function of the values that it was given, in order.

    Args:
        factor: a value above `factor` times the level is a spike.
        window: how many values back the level is taken over.
    """

    def __init__(self, *, factor: float, window: int) -> None:
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=window)

    @property
    def level(self) -> float | None:
        """Median of the recent values; None while there are too few."""
        return median(self._recent) if len(self._recent) >= NUM_NEEDED else None

    def enter(self, step: int, value: float) -> Spike | None:
        """Adds a value; returns it if it is far above those before."""
        level = self.level
        self._recent.append(value)
        is_spike = level is not None and value > self.factor * level
        return Spike(step, value, level) if is_spike else None
