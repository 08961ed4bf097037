"""What a loader's processes cost together: CPU seconds, wall time, memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

BENCHMARKS = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Cost:
    """Of some batches of a loader's stream."""

    cpu_seconds: float
    wall_seconds: float
    first_batch_seconds: float  # from the start of the process


def stream_cost(
    python: Path | str, module: str, *arguments: object, skipped: int, counted: int
) -> Cost:
    """Runs a module that prints a line for every batch, and says what `counted` batches cost.

    The first `skipped` batches are not counted, and the loader is expected to have more ahead when
    the last one comes: so it has loaded as much ahead at the end of the count as at its beginning.
    """
    command = [str(python), "-m", module, *map(str, arguments)]
    start = time.monotonic()
    with subprocess.Popen(command, cwd=BENCHMARKS, stdout=subprocess.PIPE, text=True) as process:
        marks = []
        for number, _ in enumerate(process.stdout, start=1):
            if number in (1, skipped, skipped + counted):
                marks.append((time.monotonic(), cpu_seconds(process.pid)))
    if process.returncode or len(marks) < 3:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")
    (first, _), (wall_before, cpu_before), (wall_after, cpu_after) = marks
    return Cost(cpu_after - cpu_before, wall_after - wall_before, first - start)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process and all below it, those that ended included."""
    total = 0.0
    for process in process_tree(pid):
        try:
            total += sum(process.cpu_times()[:4])  # its own, and that of children it waited for
        except psutil.NoSuchProcess:
            continue
    return total


def process_tree(pid: int) -> Sequence[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]
