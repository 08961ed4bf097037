"""The run folder: config and versions of a run, its attempts, and its metrics.

    config.yaml  environment.json      written before the first step
    attempts/<attempt>.json            one per start (see pretrain.run.attempts)
    failures/  stacks/                 one file per failed or hung rank (see run.end_causes)
    metrics/<attempt>.jsonl            one row per logged step or validation
    bad_samples/<attempt>.jsonl        one row per substituted sample
    status.json                        state and step of the run
    warm_start.json                    origin of every tensor (see pretrain.warm_start)

Only the main process writes here.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

from data_prep.storage.atomic import write_atomically
from data_prep.storage.sealed import (
    DamagedFileError,
    check_types,
    to_sealed_json,
    to_sealed_row,
)
from data_prep.versions import package_versions
from pretrain.checkpoints.record import CheckpointRecord
from pretrain.data.batch import BadSample
from pretrain.distributed.collectives import rank
from pretrain.run.attempts import (
    Attempt,
    SupersededError,
    claim_attempt,
    is_superseded,
    last_valid_step,
    now,
    read_attempts,
    read_metrics,
    read_valid_rows,
    restarts_of_job,
    superseded_error,
    write_attempt,
)
from pretrain.run.checkpoint_identity import refuse_checkpoints_of_other_run
from pretrain.run.compatibility import ENVIRONMENT_FILE, FINGERPRINTS_KEY, RunIdentity
from pretrain.run.computed_on import git_commit
from pretrain.run.end_causes import lost_nodes, write_failure
from pretrain.run.fork import check_parent
from pretrain.run.lost_checkpoints import refuse_other_checkpoints
from pretrain.run.status_file import write_status_file
from pretrain.stored_config import write_config


def begin_attempt(
    identity: RunIdentity,
    *,
    hosts: Sequence[str],
    num_micro_batches: int,
    computed_on: Mapping[str, str] | None = None,
) -> Attempt:
    """Claims the next attempt at a run and writes the run's config; for the main process.

    Args:
        identity: resolved config, and fingerprints of everything that the run reads.
        hosts: [ranks] machine names.
        num_micro_batches: micro-batches per step.
        computed_on: result of `describe_computation`.

    Raises:
        InputError: if the run folder or the folder of checkpoints holds a run whose config or data
            differ, with the keys listed. Also if the run's checkpoints are gone, or its parent
            cannot be used.
    """
    config, environ = identity.config, os.environ
    folder = config.run.folder
    identity.refuse_other_run()
    refuse_other_checkpoints(config.run)
    refuse_checkpoints_of_other_run(identity)
    check_parent(identity)
    attempt = claim_attempt(
        folder,
        world_size=len(hosts),
        strategy=config.engine.strategy,
        num_micro_batches=num_micro_batches,
        hosts=hosts,
        job=environ.get("SLURM_JOB_ID"),
        job_restarts=restarts_of_job(environ),
        lost_machines=lost_nodes(read_attempts(folder), environ),
        computed_on=dict(computed_on or {}),
    )
    for name in ("metrics", "bad_samples"):
        (folder / name).mkdir(exist_ok=True)
    environment = {FINGERPRINTS_KEY: dict(identity.fingerprints)} | describe_environment()
    write_atomically(folder / ENVIRONMENT_FILE, to_sealed_json(environment, indent=2))
    # Last, because its presence marks the folder as one that holds a run.
    write_config(folder, config)
    return attempt


class RunFolder:
    """One attempt's part of the run folder.

    Args:
        folder: run folder.
        attempt: this attempt, as the main process claimed it.
        num_steps: number of steps in the run.
        is_writer: whether this is the main process; other processes write nothing.
    """

    def __init__(self, folder: Path, attempt: Attempt, *, num_steps: int, is_writer: bool) -> None:
        self.folder = folder
        self.attempt = attempt
        self.num_steps = num_steps
        self.num_steps_done = 0
        self.skipped_steps: list[int] = []  # steps not applied, also in earlier attempts
        self.last_checkpoint: int | None = None  # step of the newest committed checkpoint
        # Request that ended the attempt early; set before the `recorded` block ends.
        self.stop_cause: str | None = None
        self.is_writer = is_writer
        self._rank = rank()

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Records how this attempt ends; the attempt runs inside the `with` block."""
        try:
            yield
        except BaseException as error:
            write_failure(self.folder, self.attempt.attempt, error, rank=self._rank)
            is_superseded = isinstance(error, SupersededError)
            self._end("superseded" if is_superseded else f"failed: {error!r}", state="failed")
            raise
        is_finished = self.stop_cause is None and self.num_steps_done >= self.num_steps
        outcome = "finished" if is_finished else "stopped"
        self._record(stop_cause=self.stop_cause)
        self._end(outcome, state=outcome)

    def begin_from(self, step: int, *, has_checkpoint: bool) -> None:
        """Records the step that this attempt starts from.

        Args:
            step: number of steps done.
            has_checkpoint: whether this run, not only its parent, has a checkpoint of that step.
        """
        self.num_steps_done = step
        self.last_checkpoint = step if has_checkpoint else None
        self._record(from_step=step)

    def _end(self, outcome: str, *, state: str) -> None:
        self._record(to_step=self.num_steps_done, ended=now(), outcome=outcome)
        self.write_status(state)

    def _record(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.attempt, name, value)
        if self.is_writer:
            write_attempt(self.folder, self.attempt)

    def is_superseded(self) -> bool:
        """Returns whether a newer attempt has begun."""
        return is_superseded(self.folder, self.attempt)

    def refuse_if_superseded(self) -> None:
        """Checks that no newer attempt has begun.

        Raises:
            SupersededError: if a newer attempt has begun.
        """
        if self.is_superseded():
            raise self.superseded_error()

    def superseded_error(self) -> SupersededError:
        """Returns the error to raise when a newer attempt has begun."""
        return superseded_error(self.folder, self.attempt)

    def includes_checkpoint(self, record: CheckpointRecord) -> bool:
        """Returns whether a checkpoint belongs to the run's history.

        Checkpoints that a superseded attempt wrote after a newer attempt had started from an
        earlier step do not.
        """
        attempts = read_attempts(self.folder)
        return record.state.step <= last_valid_step(attempts, record.written_by["attempt"])

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Appends a metrics row."""
        self._append("metrics", [row])

    def has_validation(self, step: int) -> bool:
        """Returns whether the metrics hold the validation after a step; for the main process."""
        return any(r["step"] == step for r in read_metrics(self.folder) if "validation" in r)

    def write_bad_samples(self, step: int, entries: Sequence[tuple[str, BadSample]]) -> None:
        """Appends a step's substitutions, (stream, bad sample), to the ledger."""
        rows = [{"step": step, "stream": stream} | asdict(bad) for stream, bad in entries]
        self._append("bad_samples", rows)

    def read_bad_samples(self) -> list[tuple[str, BadSample]]:
        """Reads the valid entries of all attempts; for the main process."""
        entries = []
        for row in read_valid_rows(self.folder, "bad_samples", check=check_bad_sample_row):
            stream = row.pop("stream")
            del row["step"]
            entries.append((stream, BadSample(**row)))
        return entries

    @property
    def tags(self) -> list[str]:
        """Reasons, of this and earlier attempts, why the result depends on more than the config."""
        return self.attempt.tags

    def add_tag(self, reason: str) -> None:
        """Records a reason why the run's result depends on more than its config.

        The tag is permanent: it is in this attempt's record, later attempts and all checkpoints.
        """
        if reason not in self.tags:
            self._record(tags=sorted({*self.tags, reason}))

    def write_status(self, state: str) -> None:
        """Writes status.json, unless this attempt is superseded."""
        if self.is_writer and not self.is_superseded():
            status = {
                "state": state,
                "attempt": self.attempt.attempt,
                "step": self.num_steps_done,
                "num_steps": self.num_steps,
                "last_checkpoint": self.last_checkpoint,
                "updated": now(),
            }
            write_status_file(self.folder, status)

    def flush(self) -> None:
        """Flushes the rows written so far to disk, before a checkpoint that relies on them.

        The rows then survive a power failure.
        """
        for name in ("metrics", "bad_samples") if self.is_writer else ():
            path = self._rows_of(name)
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def _rows_of(self, name: str) -> Path:
        return self.folder / name / f"{self.attempt.attempt}.jsonl"

    def _append(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if self.is_writer:
            with self._rows_of(name).open("a", encoding="utf-8") as file:
                file.writelines(to_sealed_row(row) for row in rows)


def check_bad_sample_row(row: dict[str, Any]) -> None:
    """Checks a row of the ledger of substituted samples.

    Raises:
        DamagedFileError: if a value is missing or of another type.
    """
    types = {"step": int, "stream": str} | get_type_hints(BadSample)
    check_types(row, types, optional=("is_shard_bad",))
    unknown = row.keys() - types.keys()
    if unknown:
        raise DamagedFileError(f"expected the keys {', '.join(types)}, found {min(unknown)!r}")


def describe_environment() -> dict[str, Any]:
    """Returns the versions that a result may depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": git_commit(),
        "packages": package_versions(),
    }
