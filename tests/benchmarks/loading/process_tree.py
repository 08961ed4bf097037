"""Costs of all processes of a loader: CPU seconds, wall time, memory."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Cost:
    """Of some batches of a loader's stream."""

    cpu_seconds: float
    wall_seconds: float
    first_batch_seconds: float  # from the start of the process


def batches_of(python: Path | str, module: str, *arguments: object) -> Iterator[int]:
    """Runs a module that prints a line for every batch, and yields its process id at each."""
    command = [str(python), "-m", module, *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for _ in process.stdout:
            yield process.pid
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit status {process.returncode}")


def stream_cost(
    python: Path | str, module: str, *arguments: object, skipped: int, counted: int
) -> Cost:
    """Measures the cost of `counted` batches after the first `skipped` ones.

    The loader must still have batches to load after the last one. Then it is as far ahead at the
    end of the count as at its beginning.
    """
    start = time.monotonic()
    marks = {
        number: (time.monotonic(), cpu_seconds(pid))
        for number, pid in enumerate(batches_of(python, module, *arguments), start=1)
        if number in (1, skipped, skipped + counted)
    }
    (wall_before, cpu_before), (wall_after, cpu_after) = marks[skipped], marks[skipped + counted]
    return Cost(cpu_after - cpu_before, wall_after - wall_before, marks[1][0] - start)


def cpu_seconds(pid: int) -> float:
    """Returns user and system time of a process and its descendants, ended ones included."""
    total = 0.0
    for process in process_tree(pid):
        times = process.cpu_times()  # its own, and that of children it waited for
        total += times.user + times.system + times.children_user + times.children_system
    return total


def memory(pid: int) -> tuple[int, int]:
    """Returns (RSS, PSS) in bytes of a process tree; PSS counts shared memory once."""
    infos = [process.memory_full_info() for process in process_tree(pid)]
    return sum(info.rss for info in infos), sum(info.pss for info in infos)


def process_tree(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]
