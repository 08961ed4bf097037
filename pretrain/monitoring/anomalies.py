"""Anomalies of steps: spikes of loss and gradient norm, slow steps, and skipped steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pretrain.config import Watch

SPIKING = {"total_loss": "loss_spike_factor", "grad_norm": "grad_norm_spike_factor"}
NUM_NEEDED = 20  # number of values from which the level is defined


class StepWatch:
    """Detector of anomalies in the steps of one attempt.

    Args:
        settings: config section `watch`.
        rows: metrics rows of earlier attempts, which determine the level of loss and gradient norm.
            Steps that were not logged do not count.
    """

    def __init__(self, settings: Watch, *, rows: Iterable[Mapping[str, Any]]) -> None:
        self.settings = settings
        self._detectors = {
            name: SpikeDetector(factor=getattr(settings, key), window=settings.window_steps)
            for name, key in SPIKING.items()
        }
        for row in rows:
            for name, detector in self._detectors.items():
                if row.get(name) is not None:
                    detector.record(row["step"], row[name])
        self._times = SpikeDetector(factor=settings.slow_step_factor, window=settings.window_steps)
        self._spikes: list[dict[str, Any]] = []
        self._num_slow = 0  # consecutive
        self._is_reported_slow = False

    def record(self, step: int, *, values: Mapping[str, float], seconds: float) -> list[str]:
        """Adds a step and returns log lines on its spikes.

        Args:
            step: number of steps done.
            values: total_loss and grad_norm; empty if the step was skipped.
            seconds: duration of the step, without validation and saving.
        """
        is_slow = self._times.record(step, seconds) is not None
        self._num_slow = self._num_slow + 1 if is_slow else 0
        lines = []
        for name, value in values.items():
            spike = self._detectors[name].record(step, value)
            if spike is not None:
                self._spikes.append({"of": name} | asdict(spike))
                lines.append(
                    f"{name} {value:.4g} is a spike: {value / spike.median:.1f} times its median "
                    f"{spike.median:.4g}"
                )
        return lines

    @property
    def _are_slow(self) -> bool:
        return self._num_slow >= self.settings.slow_steps

    def take_row(self) -> dict[str, Any]:
        """Returns the anomalies since the last row, as columns of a metrics row."""
        row: dict[str, Any] = {}
        if self._spikes:
            row["spikes"] = self._spikes
        if self._are_slow:
            row["slow_steps"] = {
                "num_running": self._num_slow,
                "median_seconds": self._times.level,
            }
        self._spikes = []
        return row

    def lines_on_pace(
        self, seconds: Mapping[str, float], slowest: Mapping[str, Any] | None
    ) -> list[str]:
        """Returns log lines when steps become slow and when their pace recovers.

        Args:
            seconds: {phase: seconds per step}, mean over ranks.
            slowest: rank that the others wait for, as in the metrics row.
        """
        if self._are_slow == self._is_reported_slow:
            return []
        self._is_reported_slow = self._are_slow
        if not self._are_slow:
            return ["the pace of steps has recovered"]
        phases = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items() if value)
        line = (
            f"{self._num_slow} consecutive steps took more than "
            f"{self.settings.slow_step_factor:g} times the median of {self._times.level:.2f} s; "
            f"seconds per step: {phases}"
        )
        if slowest is not None:
            line += (
                f"; slowest is rank {slowest['rank']} on {slowest['host']}, in {slowest['phase']}: "
                f"{slowest['seconds']:.2f} s, mean over ranks {slowest['mean_seconds']:.2f} s"
            )
        return [line]


def reason_to_stop(watch: Watch, *, skipped_steps: Sequence[int]) -> str | None:
    """Returns why a run must stop after its last skipped step; None if it may continue."""
    if watch.on_non_finite == "stop":
        return "watch.on_non_finite=stop"
    window = watch.skip_window_steps
    num_recent = sum(skipped_steps[-1] - window < each for each in skipped_steps)
    if num_recent <= watch.max_skipped_steps:
        return None
    return (
        f"it is one of {num_recent} within {window} steps, above "
        f"watch.max_skipped_steps={watch.max_skipped_steps}"
    )


@dataclass(frozen=True)
class Spike:
    """A value far above the level."""

    step: int
    value: float
    median: float  # median of the previous values


class SpikeDetector:
    """Detector of values far above the recent median; a pure function of the values in order.

    Args:
        factor: a value above `factor` times the level is a spike.
        window: number of previous values; their median is the level.
    """

    def __init__(self, *, factor: float, window: int) -> None:
        self.factor = factor
        self._recent: deque[float] = deque(maxlen=window)

    @property
    def level(self) -> float | None:
        """Median of the recent values; None while there are too few."""
        return median(self._recent) if len(self._recent) >= NUM_NEEDED else None

    def record(self, step: int, value: float) -> Spike | None:
        """Adds a value and returns it if it is a spike."""
        level = self.level
        self._recent.append(value)
        is_spike = level is not None and value > self.factor * level
        return Spike(step, value, level) if is_spike else None
