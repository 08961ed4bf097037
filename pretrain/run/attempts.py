"""Attempts at a run: each start claims the next number, and the newest attempt owns the run.

    attempts/<attempt>.json    record of one start; written by that attempt alone

An attempt claims a number by creating its file. Only one process can create a file, so two
simultaneous starts never share a number. An older attempt may still be running, on a node that lost
its network. It stops when it finds the newer attempt's file. Rows that it wrote for steps after the
newer attempt's first are ignored.
"""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from data_prep.errors import RunError
from data_prep.storage.atomic import write_atomically
from data_prep.storage.sealed import (
    DamagedFileError,
    check_time,
    check_types,
    read_sealed_json,
    read_sealed_row,
    to_sealed_json,
    warn_once,
)

logger = logging.getLogger(__name__)

FOLDER = "attempts"
ATTEMPT_NAME = re.compile(r"\d{4,}")
# Fields whose names in the file differ from those in the code: field -> key in the file.
STORED_NAMES = {"num_micro_batches": "micro_batches", "tags": "marks"}


# Values of a metrics row that are read again; those of a step have all the first.
METRICS_TYPES = {"samples_seen": int, "samples_per_second": float, "data_wait_share": float}
OPTIONAL_METRICS_TYPES = {
    "loss": dict[str, float | None],
    "total_loss": float | None,
    "grad_norm": float | None,
    "validation": dict[str, dict],
    "validation_ema": dict[str, dict],
}


class SupersededError(RunError):
    """A newer attempt at the same run has begun."""


class DivergedError(RunError):
    """A step is not finite, and recomputing it would not change it."""


class LostPeerError(RunError):
    """Another rank died, or did not reach a collective in time."""


@dataclass
class Attempt:
    """One start of a run and its outcome."""

    attempt: str  # number of the attempt, with four digits or more
    started: str
    world_size: int
    strategy: str
    num_micro_batches: int  # per step
    hosts: list[str]
    # reasons why the result is not a function of the config alone
    tags: list[str] = field(default_factory=list)
    from_step: int | None = None  # number of steps done before the attempt
    to_step: int | None = None  # number of steps done at its end
    ended: str | None = None
    outcome: str = "running"
    stop_cause: str | None = None  # signal or file that requested the stop
    job: str | None = None  # id of the Slurm job
    job_restarts: int = 0  # restarts of that job before this start
    lost_machines: str | None = None  # nodes of the previous attempt that Slurm has lost
    # machines, libraries and settings that affect rounding (see pretrain.run.computed_on)
    computed_on: dict[str, str] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return int(self.attempt)


def stored_name(name: str) -> str:
    """Returns the key in the file of an attempt's field."""
    return STORED_NAMES.get(name, name)


STORED_TYPES = {stored_name(name): kind for name, kind in get_type_hints(Attempt).items()}
OPTIONAL_KEYS = {
    stored_name(each.name)
    for each in fields(Attempt)
    if each.default is not MISSING or each.default_factory is not MISSING
}


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
            continue  # another process has claimed the number
        write_attempt(folder, attempt)
        return attempt


def write_attempt(folder: Path, attempt: Attempt) -> None:
    """Writes the record of an attempt."""
    values = {stored_name(name): value for name, value in asdict(attempt).items()}
    write_atomically(_path_of(folder, attempt.attempt), to_sealed_json(values, indent=2))


def read_attempts(folder: Path) -> list[Attempt]:
    """Reads the attempts at the run in a folder, oldest first.

    An attempt that has a successor but did not record its end has the outcome "did not end". A
    damaged record is logged and skipped.
    """
    attempts = []
    newest = _newest_number(folder)
    for number, path in _files(folder):
        content = path.read_bytes()
        if not content:  # just claimed, or the process died after claiming it
            continue
        try:
            attempt = parse_attempt(content, name=path.stem)
        except DamagedFileError as error:
            warn_once(logger, f"{path}: damaged: {error}; this attempt is left out")
            continue
        is_over = number < newest and attempt.outcome == "running"
        attempts.append(replace(attempt, outcome="did not end") if is_over else attempt)
    return attempts


def parse_attempt(content: bytes, *, name: str) -> Attempt:
    """Parses the record of an attempt.

    Args:
        content: content of its file.
        name: number of the attempt, from the file's name.

    Raises:
        DamagedFileError: if the content is damaged.
    """
    values, _ = read_sealed_json(content, unsealed_keys=STORED_TYPES)
    check_types(values, STORED_TYPES, optional=OPTIONAL_KEYS)
    check_time(values["started"], key="started")
    if values["attempt"] != name:
        raise DamagedFileError(f"attempt: expected {name!r}, found {values['attempt']!r}")
    stored = {each.name: stored_name(each.name) for each in fields(Attempt)}
    return Attempt(**{name: values[key] for name, key in stored.items() if key in values})


def is_superseded(folder: Path, attempt: Attempt) -> bool:
    """Returns whether a newer attempt has begun; checks for one file."""
    return _path_of(folder, f"{attempt.number + 1:04d}").exists()


def superseded_error(folder: Path, attempt: Attempt) -> SupersededError:
    """Returns the error to raise when a newer attempt has begun."""
    return SupersededError(
        f"{folder}: a newer attempt at this run began while attempt {attempt.attempt} was still "
        f"running (see {FOLDER}/ in it); the older one stops without saving, and nothing is lost: "
        "the newer one resumes from the newest checkpoint"
    )


def last_valid_step(attempts: Sequence[Attempt], attempt: str) -> float:
    """Returns the last step of an attempt that is valid: the step that a newer one started from.

    Args:
        attempts: all attempts at the run.
        attempt: number of the attempt.
    """
    newer = [each.from_step for each in attempts if each.number > int(attempt)]
    return min((step for step in newer if step is not None), default=math.inf)


def read_valid_rows(
    folder: Path, name: str, *, check: Callable[[dict[str, Any]], None]
) -> Iterator[dict[str, Any]]:
    """Yields the valid rows of a folder of <attempt>.jsonl files, oldest attempt first.

    Args:
        folder: run folder.
        name: name of a folder in the run folder.
        check: raises DamagedFileError if a row does not belong to this folder.
    """
    attempts = read_attempts(folder)
    paths = [p for p in (folder / name).glob("*.jsonl") if ATTEMPT_NAME.fullmatch(p.stem)]
    for path in sorted(paths, key=lambda path: int(path.stem)):
        last_step = last_valid_step(attempts, path.stem)
        yield from (row for row in read_rows(path, check=check) if row["step"] <= last_step)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Reads one row per logged step and per validation, in step order, from all attempts at a run.

    Where attempts overlap, the row of the newest attempt is used. Rows that an attempt wrote for
    steps after a newer attempt's first are ignored.
    """
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for row in read_valid_rows(folder, "metrics", check=check_metrics_row):
        rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def check_metrics_row(row: dict[str, Any]) -> None:
    """Checks the values of a metrics row that are read again.

    Raises:
        DamagedFileError: if one is missing or of another type.
    """
    is_of_step = "samples_per_second" in row
    check_types(row, METRICS_TYPES, optional=() if is_of_step else METRICS_TYPES)
    check_types(row, OPTIONAL_METRICS_TYPES, optional=OPTIONAL_METRICS_TYPES)


def read_rows(
    path: Path, *, check: Callable[[dict[str, Any]], None] = lambda row: None
) -> list[dict[str, Any]]:
    """Reads the rows of a .jsonl file, without an incomplete last line; none if it is missing.

    Damaged rows are logged and left out.

    Args:
        path: file of rows with the key "step".
        check: raises DamagedFileError for a row that the file cannot have.
    """
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = read_sealed_row(line)
            check_types(row, {"step": int})
            check(row)
        except DamagedFileError as error:
            warn_once(logger, f"{path}:{number}: damaged: {error}; this row is left out")
        else:
            rows.append(row)
    return rows


def restarts_of_job(environment: Mapping[str, str]) -> int:
    """Returns the number of times that Slurm has restarted this job; 0 without Slurm."""
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


def _path_of(folder: Path, attempt: str) -> Path:
    return folder / FOLDER / f"{attempt}.json"


def _files(folder: Path) -> list[tuple[int, Path]]:
    """[(number, path)], oldest first"""
    found = [path for path in (folder / FOLDER).glob("*.json") if ATTEMPT_NAME.fullmatch(path.stem)]
    return sorted((int(path.stem), path) for path in found)


def _newest_number(folder: Path) -> int:
    files = _files(folder)
    return files[-1][0] if files else 0
