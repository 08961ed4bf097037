"""Attempts at a run: each start claims the next number, and the newest attempt owns the run.

    attempts/<attempt>.json    record of one start; written by that attempt alone

Creating its file claims a number. The file system lets only one process create it, so two starts at
the same instant never share a number. An older attempt may still be alive, on a node that lost its
network. It stops when it finds the newer attempt's file. Rows that it wrote for steps after the
newer attempt's first are ignored.
"""

from __future__ import annotations

import json
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from data_prep.errors import RunError
from data_prep.storage.atomic import write_atomically

FOLDER = "attempts"
ATTEMPT_NAME = re.compile(r"\d{4,}")
# Fields whose names in the file are older than those in the code.
STORED_NAMES = {"num_micro_batches": "micro_batches", "tags": "marks"}


class SupersededError(RunError):
    """A newer attempt at the same run has begun."""


class DivergedError(RunError):
    """A step is not finite, and would be the same if it were computed again."""


class LostPeerError(RunError):
    """Another rank died, or did not reach a collective in time."""


@dataclass
class Attempt:
    """One start of a run, and how it ended."""

    attempt: str  # its number, with four digits or more
    started: str
    world_size: int
    strategy: str
    num_micro_batches: int  # per step
    hosts: list[str]
    tags: list[str] = field(
        default_factory=list
    )  # why the result is not a function of the config alone
    from_step: int | None = None  # number of steps done before it
    to_step: int | None = None  # number of steps done at its end
    ended: str | None = None
    outcome: str = "running"
    stop_cause: str | None = None  # signal or file that asked it to stop
    job: str | None = None  # id of the Slurm job
    job_restarts: int = 0  # restarts of that job before this start
    lost_machines: str | None = None  # nodes of the previous attempt that Slurm has lost

    @property
    def number(self) -> int:
        return int(self.attempt)


def claim_attempt(
    folder: Path,
    *,
    world_size: int,
    strategy: str,
    num_micro_batches: int,
    hosts: Sequence[str],
    **others: Any,
) -> Attempt:
    """Claims the next attempt at the run in a folder, for this process alone.

    Args:
        folder: run folder.
        world_size: number of processes.
        strategy: strategy of the engine.
        num_micro_batches: micro-batches per step.
        hosts: machine names.
        **others: further fields of the attempt.
    """
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    earlier = read_attempts(folder)
    number = _newest_number(folder)
    while True:
        number += 1
        attempt = Attempt(
            attempt=f"{number:04d}",
            started=now(),
            world_size=world_size,
            strategy=strategy,
            num_micro_batches=num_micro_batches,
            hosts=sorted(set(hosts)),
            tags=sorted({tag for each in earlier for tag in each.tags}),
            **others,
        )
        try:
            os.close(os.open(_path_of(folder, attempt.attempt), os.O_CREAT | os.O_EXCL, 0o644))
        except FileExistsError:
            continue  # another process was faster
        write_attempt(folder, attempt)
        return attempt


def write_attempt(folder: Path, attempt: Attempt) -> None:
    """Writes the record of an attempt."""
    values = {STORED_NAMES.get(name, name): value for name, value in asdict(attempt).items()}
    content = json.dumps(values, indent=2).encode() + b"\n"
    write_atomically(_path_of(folder, attempt.attempt), content)


def read_attempts(folder: Path) -> list[Attempt]:
    """Reads the attempts at the run in a folder, oldest first.

    One that has a successor and did not record its end has the outcome "did not end".
    """
    attempts = []
    newest = _newest_number(folder)
    for number, path in _files(folder):
        content = path.read_text(encoding="utf-8")
        if not content:  # just claimed, or its process died right then
            continue
        attempt = _from_json(content)
        is_over = number < newest and attempt.outcome == "running"
        attempts.append(replace(attempt, outcome="did not end") if is_over else attempt)
    return attempts


def is_superseded(folder: Path, attempt: Attempt) -> bool:
    """Returns whether a newer attempt has begun; one look at the file system."""
    return _path_of(folder, f"{attempt.number + 1:04d}").exists()


def superseded_error(folder: Path, attempt: Attempt) -> SupersededError:
    """Returns the error to raise when a newer attempt has begun."""
    return SupersededError(
        f"{folder}: a newer attempt at this run began while attempt {attempt.attempt} was still "
        f"running (see {FOLDER}/ there); this older one stops without saving, and nothing is lost: "
        "the newer one resumes from the newest checkpoint"
    )


def last_counting_step(attempts: Sequence[Attempt], attempt: str) -> float:
    """Returns the last step whose rows count for an attempt: the step that a newer one began from.

    Args:
        attempts: all attempts at the run.
        attempt: number of the attempt in question.
    """
    newer = [each.from_step for each in attempts if each.number > int(attempt)]
    return min((step for step in newer if step is not None), default=math.inf)


def read_counting_rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """Yields the valid rows of a folder of <attempt>.jsonl files, oldest attempt first.

    Args:
        folder: run folder.
        name: name of a folder in it.
    """
    attempts = read_attempts(folder)
    for path in sorted((folder / name).glob("*.jsonl"), key=lambda path: int(path.stem)):
        last_step = last_counting_step(attempts, path.stem)
        yield from (row for row in read_rows(path) if row["step"] <= last_step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads one row per logged step and per validation, in step order, from all attempts at a run.

    Where attempts overlap, the row of the latest one is taken. Rows that an attempt wrote for steps
    after a newer attempt's first are ignored.
    """
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in read_counting_rows(folder, "metrics"):
        rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads the rows of a .jsonl file, without an incomplete last line; none if it is missing."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def restarts_of_job(environment: Mapping[str, str]) -> int:
    """Returns how often Slurm has restarted this job; 0 without Slurm."""
    return int(environment.get("SLURM_RESTART_COUNT") or 0)


def is_of_this_start(attempt: Attempt, environment: Mapping[str, str]) -> bool:
    """Returns whether an attempt belongs to the current start of this Slurm job.

    Without Slurm, returns whether the attempt was made without Slurm.
    """
    here = (environment.get("SLURM_JOB_ID"), restarts_of_job(environment))
    return (attempt.job, attempt.job_restarts) == here


def machine_name() -> str:
    """Returns the name of this machine; under Slurm, the node name that Slurm uses."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def now() -> str:
    """Returns the time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _from_json(content: str) -> Attempt:
    names = {stored: name for name, stored in STORED_NAMES.items()}
    return Attempt(**{names.get(key, key): value for key, value in json.loads(content).items()})


def _path_of(folder: Path, attempt: str) -> Path:
    return folder / FOLDER / f"{attempt}.json"


def _files(folder: Path) -> list[tuple[int, Path]]:
    """[(number, path)], oldest first"""
    found = [path for path in (folder / FOLDER).glob("*.json") if ATTEMPT_NAME.fullmatch(path.stem)]
    return sorted((int(path.stem), path) for path in found)


def _newest_number(folder: Path) -> int:
    files = _files(folder)
    return files[-1][0] if files else 0
