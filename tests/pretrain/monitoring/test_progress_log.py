"""The line that a run writes about once a minute."""

from datetime import UTC, datetime
from itertools import pairwise

import pytest

from pretrain.config import Run
from pretrain.monitoring.progress_log import Progress, ProgressLog

NOW = datetime(2026, 11, 27, 12, 0, tzinfo=UTC)


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def lines_of_run(*, seconds_per_step, num_steps=1000, first=0, **run):
    """Returns [(second, line)] for steps of 64 samples that wait for a tenth of their time."""
    clock = Clock()
    settings = {"folder": "run", "checkpoint_every_steps": 400} | run
    log = ProgressLog(
        Run(**settings),
        Progress(first, 64 * first, 0.0),
        num_steps=num_steps,
        clock=clock,
        now=lambda: NOW,
    )
    lines = []
    for step in range(first + 1, num_steps + 1):
        clock.seconds += seconds_per_step
        line = log.line(Progress(step, 64 * step, 0.1 * clock.seconds), f"loss {step}")
        if line is not None:
            lines.append((round(clock.seconds), line))
    return lines


@pytest.mark.parametrize(("seconds_per_step", "expected"), [(0.5, 10), (20, 334), (90, 1000)])
def test_there_is_a_line_a_minute_however_long_steps_are(seconds_per_step, expected):
    lines = lines_of_run(seconds_per_step=seconds_per_step)
    assert len(lines) == expected
    assert lines[0][1].startswith("step 1 of 1,000: loss 1; ")
    assert lines[-1][1].startswith("step 1,000 of 1,000: loss 1000; ")
    assert all(b - a >= 60 for (a, _), (b, _) in pairwise(lines[:-1]))


def test_a_line_tells_of_the_steps_since_the_one_before():
    [_, (_, line), *_] = lines_of_run(seconds_per_step=0.5, first=200)
    end = f"{NOW.astimezone():%Y-%m-%d}"
    assert line.startswith(
        "step 321 of 1,000: loss 321; 128 samples/s, data wait 10%; checkpoint in 40 s; "
        f"ends in 5 min 40 s, {end}"
    )


def test_a_checkpoint_may_be_due_by_the_clock():
    [_, (_, first), (_, second), *_] = lines_of_run(
        seconds_per_step=0.5, checkpoint_every_minutes=1.5
    )
    assert "checkpoint in 30 s" in first  # a minute and a half after the beginning
    assert "checkpoint in 0 s" in second  # none was begun
