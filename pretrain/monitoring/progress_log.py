"""Progress lines of a run without a progress bar, about one per minute."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pretrain.config import Run

SECONDS_BETWEEN_LINES = 60.0


@dataclass(frozen=True)
class Progress:
    """Progress of a run after a step."""

    step: int
    samples_seen: int
    data_seconds: float  # time spent waiting for data in this attempt


class ProgressLog:
    """Formats progress lines and decides when one is due.

    A line covers all steps since the previous line. It is due after the first step of an attempt,
    after the last one, and whenever a minute has passed. The first line projects no end, because
    the first step includes one-time work.

    Args:
        run: config section `run`.
        begin: progress before the first step.
        num_steps: number of steps in the run.
        clock: returns seconds.
        now: returns the time.
    """

    def __init__(
        self,
        run: Run,
        begin: Progress,
        *,
        num_steps: int,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.run = run
        self.num_steps = num_steps
        self._clock, self._now = clock, now
        self._first = begin.step + 1
        self._last = begin
        self._last_time = self._last_save = clock()

    def saved(self) -> None:
        """Records the start of a checkpoint."""
        self._last_save = self._clock()

    def line(self, progress: Progress, shown: str) -> str | None:
        """Returns the line after a step; None if none is due.

        Args:
            progress: progress after the step.
            shown: text with the loss and other values.
        """
        seconds = self._clock() - self._last_time
        is_first, is_last = progress.step == self._first, progress.step == self.num_steps
        if not (is_first or is_last or seconds >= SECONDS_BETWEEN_LINES):
            return None
        seconds = max(seconds, 1e-9)
        pace = (progress.samples_seen - self._last.samples_seen) / seconds
        wait = (progress.data_seconds - self._last.data_seconds) / seconds
        parts = [
            f"step {progress.step:,} of {self.num_steps:,}: {shown}",
            f"{pace:,.0f} samples/s, data wait {wait:.0%}",
        ]
        if not (is_first or is_last):
            seconds_per_step = seconds / (progress.step - self._last.step)
            to_save = timedelta(seconds=self._seconds_to_save(progress.step, seconds_per_step))
            left = timedelta(seconds=(self.num_steps - progress.step) * seconds_per_step)
            end = (self._now() + left).astimezone()
            parts.append(f"checkpoint in {in_words(to_save)}")
            parts.append(f"ends in {in_words(left)}, {end:%Y-%m-%d %H:%M}")
        self._last, self._last_time = progress, self._clock()
        return "; ".join(parts)

    def _seconds_to_save(self, step: int, seconds_per_step: float) -> float:
        every = self.run.checkpoint_every_steps
        by_steps = min(every - step % every, self.num_steps - step) * seconds_per_step
        if self.run.checkpoint_every_minutes is None:
            return by_steps
        by_clock = self._last_save + 60 * self.run.checkpoint_every_minutes - self._clock()
        return min(by_steps, max(0.0, by_clock))


def in_words(time: timedelta) -> str:
    """Formats a duration, such as 2 d 3 h, 12 min or 5 s."""
    seconds = max(0, round(time.total_seconds()))
    units = [("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)]
    parts = []
    for name, length in units:
        count, seconds = divmod(seconds, length)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"
