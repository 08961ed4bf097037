"""Causes of failed attempts, from files that the ranks wrote and from Slurm.

    failures/<attempt>/rank_00003.txt    exception of one rank, with its traceback
    stacks/<attempt>/rank_00003.txt      see pretrain.monitoring.hang_watch

The rank that records an attempt's outcome often detects only that another rank was lost. The exit
status of a launcher is that of the last process to exit. This module does not import torch.
"""

from __future__ import annotations

import re
import subprocess
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from pretrain.run.attempts import Attempt, LostPeerError, SupersededError, machine_name, now

FAILURES, STACKS = "failures", "stacks"  # folders
SECONDS_FOR_SLURM = 20
LOST_NODE = re.compile(r"DOWN|FAIL|DRAIN|NOT_RESPONDING|\*")


def write_failure(folder: Path, attempt: str, error: BaseException, *, rank: int) -> None:
    """Writes the exception that ends a rank, unless another rank or attempt caused it.

    Args:
        folder: run folder.
        attempt: number of this attempt.
        error: exception that ends this rank.
        rank: number of this process.
    """
    if isinstance(error, LostPeerError | SupersededError):
        return
    path = folder / FAILURES / attempt / f"rank_{rank:05d}.txt"
    lines = traceback.format_exception(error)
    head = f"{now()} rank {rank} on {machine_name()}: {_summary(error)}\n\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + "".join(lines), encoding="utf-8")
    except OSError:
        return  # a full disk may be the cause: the error itself is still raised


def causes_of_end(folder: Path, attempts: Sequence[Attempt], number: int) -> list[str]:
    """Returns lines on why an attempt ended, in addition to its outcome; may be empty.

    Args:
        folder: run folder.
        attempts: all attempts at the run, oldest first.
        number: index of the attempt in `attempts`.
    """
    attempt = attempts[number]
    is_newest = number == len(attempts) - 1
    lost = None if is_newest else attempts[number + 1].lost_machines
    causes = [] if lost is None else [lost]
    is_alive = attempt.outcome == "running" and is_newest
    if is_alive or attempt.outcome in ("finished", "stopped", "superseded"):
        return causes
    return [*causes, *_failures(folder, attempt.attempt), *_stacks(folder, attempt.attempt)]


def lost_nodes(attempts: Sequence[Attempt], environment: Mapping[str, str]) -> str | None:
    """Queries Slurm for lost nodes of the last attempt, if it did not finish.

    When a node is lost, Slurm ends the job, and its processes receive a signal at most.

    Args:
        attempts: all attempts at a run, oldest first.
        environment: environment variables of this process.

    Returns:
        The lost nodes with their states and reasons; None if there are none, or without Slurm.
    """
    if not attempts or attempts[-1].outcome == "finished" or "SLURM_JOB_ID" not in environment:
        return None
    command = ["scontrol", "show", "node", "-o", ",".join(attempts[-1].hosts)]
    try:
        answer = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=SECONDS_FOR_SLURM
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None  # the answer is only information for the user
    lost = []
    for line in answer.splitlines():
        fields = dict(re.findall(r"(NodeName|State|Reason)=(.*?)(?= \w+=|$)", line))
        if LOST_NODE.search(fields.get("State", "")):
            reason = fields.get("Reason", "no reason given").strip()
            lost.append(f"{fields['NodeName']} is {fields['State']} ({reason})")
    return "; ".join(lost) or None


def _failures(folder: Path, attempt: str) -> list[str]:
    heads = [
        _text_of(path).partition("\n")[0]
        for path in sorted((folder / FAILURES / attempt).glob("*.txt"))
    ]
    failures = [head.partition(" ")[2] for head in sorted(heads) if head]  # the earliest first
    return _first_of(failures)


def _stacks(folder: Path, attempt: str) -> list[str]:
    silent, faults, hung = [], [], []
    for path in sorted((folder / STACKS / attempt).glob("*.txt")):
        head, _, rest = _text_of(path).partition("\n")
        rest = rest.strip()
        if not rest:
            silent.append(head)
        elif "Fatal Python error" in rest:
            fault = next(line for line in rest.split("\n") if "Fatal Python error" in line)
            faults.append(f"{head}: {fault}")
        else:
            hung.append(f"{head}: {rest.partition(chr(10))[0]} ({path})")
    causes = _first_of(faults)
    if silent:
        causes.append(
            f"{_first_of(silent)[0]}: exited without a traceback (SIGKILL, out of memory, or node "
            "failure)"
        )
    return [*causes, *_first_of(hung)]


def _text_of(path: Path) -> str:
    """The text for people to read, also of a damaged file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"? {path}: cannot be read: {error.strerror}"


def _first_of(lines: Sequence[str]) -> list[str]:
    others = f" (and {len(lines) - 1} other ranks)" if len(lines) > 1 else ""
    return [lines[0] + others] if lines else []


def _summary(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
