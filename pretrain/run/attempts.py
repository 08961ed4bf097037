"""The attempts at a run: each start claims the next number, and the newest attempt is the one that
counts.

    attempts/<attempt>.json    what is known of one start; written by that attempt alone

A number is claimed by creating its file, which the file system lets one process do, so two that
start at the same instant never share one. An older attempt may be alive still, on a node that was
lost from the network: it stops when it finds the newer one's file, and whatever it wrote, or writes
late, of steps after the one from which the newer began does not count.
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
    """A step is not finite, and would not be if it were taken again."""


class LostPeerError(RunError):
    """Another rank died, or did not come to where the others wait."""


@dataclass
class Attempt:
    """One start of a run, and how it ended."""

    attempt: str  # its number, of four digits or more
    started: str
    world_size: int
    strategy: str
    num_micro_batches: int  # of each step
    hosts: list[str]
    tags: list[str] = field(default_factory=list)  # why the result is not the config's alone
    from_step: int | None = None  # steps done before
    to_step: int | None = None  # steps done at its end
    ended: str | None = None
    outcome: str = "running"
    stop_cause: str | None = None  # what asked it to stop
    job: str | None = None  # of Slurm
    job_restarts: int = 0  # of that job, before this start
    lost_machines: str | None = None  # machines of the attempt before that Slurm has lost

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
    """The next attempt at the run in a folder, which is this process's alone.

    Args:
        folder: of the run.
        world_size: number of processes.
        strategy: of the engine.
        num_micro_batches: of each step.
        hosts: names of the machines.
        **others: of the attempt's fields.
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
    """Writes down what is known of an attempt by now."""
    values = {STORED_NAMES.get(name, name): value for name, value in asdict(attempt).items()}
    content = json.dumps(values, indent=2).encode() + b"\n"
    write_atomically(_path_of(folder, attempt.attempt), content)


def read_attempts(folder: Path) -> list[Attempt]:
    """The attempts at the run in a folder, oldest first.

    One that did not come to say how it ended, and has a successor, "did not end".
    """
    attempts = []
    newest = _newest_number(folder)
    for number, path in _files(folder):
        content = path.read_text(encoding="utf-8")
        if not content:  # was claimed a moment ago, or its process died right then
            continue
        attempt = _from_json(content)
        is_over = number < newest and attempt.outcome == "running"
        attempts.append(replace(attempt, outcome="did not end") if is_over else attempt)
    return attempts


def is_superseded(folder: Path, attempt: Attempt) -> bool:
    """Whether a newer attempt has begun; cheap."""
    return _path_of(folder, f"{attempt.number + 1:04d}").exists()


def superseded_error(folder: Path, attempt: Attempt) -> SupersededError:
    """What to raise when a newer attempt has begun."""
    return SupersededError(
        f"{folder}: a newer attempt at this run began while attempt {attempt.attempt} was still "
        f"running (see {FOLDER}/ there); this older one stops without saving, and nothing is lost: "
        "the newer one goes on from the newest checkpoint"
    )


def last_counting_step(attempts: Sequence[Attempt], attempt: str) -> float:
    """The step up to which what an attempt wrote counts: the one from which a newer one began.

    Args:
        attempts: all at the run.
        attempt: whose limit is wanted.
    """
    newer = [each.from_step for each in attempts if each.number > int(attempt)]
    return min((step for step in newer if step is not None), default=math.inf)


def read_counting_rows(folder: Path, name: str) -> Iterator[dict[str, Any]]:
    """The rows that count of a folder of files <attempt>.jsonl, oldest attempt first.

    Args:
        folder: of the run.
        name: of the folder in it.
    """
    attempts = read_attempts(folder)
    for path in sorted((folder / name).glob("*.jsonl"), key=lambda path: int(path.stem)):
        last_step = last_counting_step(attempts, path.stem)
        yield from (row for row in read_rows(path) if row["step"] <= last_step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """One row per logged step and per validation, in step order, from all attempts at a run.

    Where attempts overlap, the latest one's row is taken; what an attempt wrote of steps after the
    one from which a newer one began does not count.
    """
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in read_counting_rows(folder, "metrics"):
        rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none if it does not exist. A last line cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def restarts_of_job(environment: Mapping[str, str]) -> int:
    """How often Slurm has started this job before; 0 without Slurm, or at its first start."""
    return int(environment.get("SLURM_RESTART_COUNT", "0"))


def is_of_this_start(attempt: Attempt, environment: Mapping[str, str]) -> bool:
    """Whether an attempt was made since Slurm started the job this time; without Slurm, whether it
    was made without."""
    here = (environment.get("SLURM_JOB_ID"), restarts_of_job(environment))
    return (attempt.job, attempt.job_restarts) == here


def machine_name() -> str:
    """Of the machine that this process runs on: Slurm's name of the node where Slurm started it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _from_json(content: str) -> Attempt:
    names = {stored: name for name, stored in STORED_NAMES.items()}
    return Attempt(**{names.get(key, key): value for key, value in json.loads(content).items()})


def _path_of(folder: Path, attempt: str) -> Path:
    return folder / FOLDER / f"{attempt}.json"


def _files(folder: Path) -> list[tuple[int, Path]]:
    """[(number, path)] oldest first"""
    found = [path for path in (folder / FOLDER).glob("*.json") if ATTEMPT_NAME.fullmatch(path.stem)]
    return sorted((int(path.stem), path) for path in found)


def _newest_number(folder: Path) -> int:
    files = _files(folder)
    return files[-1][0] if files else 0
