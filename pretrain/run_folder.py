"""The run folder: what a run is (config, versions), its attempts, and its metrics.

    config.yaml  environment.json      written before the first step
    attempts.jsonl                     one row per start
    metrics/<attempt>.jsonl            one row per logged step or validation
    bad_samples/<attempt>.jsonl        one row per substituted sample
    status.json                        where the run stands

Only the main process writes here.
"""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from data_prep.config_file import ConfigError, differing_keys, fixed_values, read_config, to_yaml
from data_prep.shard_format import write_atomically
from pretrain.checkpoint_store import open_store
from pretrain.config import PretrainConfig
from pretrain.shard_reader import BadSample


def refuse_other_run(config: PretrainConfig, *, fingerprints: dict[str, str]) -> None:
    """
    Raises:
        ConfigError: the run folder holds a run whose config or data differ; the keys are named.
    """
    folder = config.run.folder
    if not (folder / "config.yaml").exists():
        return
    earlier = read_config(PretrainConfig, folder / "config.yaml")
    known = json.loads((folder / "environment.json").read_text())["dataset_fingerprints"]
    steps_done = _steps_done(config)
    old, new = (_what_has_been(each, steps_done) for each in (earlier, config))
    different = differing_keys(fixed_values(old), fixed_values(new))
    different |= differing_keys(
        _fingerprints_of(old, known), _fingerprints_of(new, fingerprints), prefix="fingerprint"
    )
    if config.schedule.shape == "constant":  # which has no end that its rates depend on
        different.pop("schedule.num_steps", None)
    if different:
        lines = [f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in different.items()]
        raise ConfigError(
            f"{folder} holds a run that differs from this config:\n"
            + "\n".join(lines)
            + "\nresume it with its own config, or set run.folder to a new folder"
        )


def _steps_done(config: PretrainConfig) -> int:
    """Steps of the newest checkpoint, whole or not."""
    checkpoints = open_store(config.run.checkpoints).checkpoints()
    return checkpoints[0].step if checkpoints else 0


def _what_has_been(config: PretrainConfig, steps_done: int) -> PretrainConfig:
    """The config without the segments that no step has used yet: those may still change."""
    pairings = {
        name: pairing.model_copy(
            update={"segments": [each for each in pairing.segments if each.from_step < steps_done]}
        )
        for name, pairing in config.pairings.items()
    }
    return config.model_copy(update={"pairings": pairings})


def _fingerprints_of(config: PretrainConfig, fingerprints: dict[str, str]) -> dict[str, str]:
    """Those of the sources that a config names, of its validation sets and teachers."""
    names = {
        f"{name}/{source.name}"
        for name, pairing in config.pairings.items()
        for source in pairing.all_sources
    }
    return {
        key: value
        for key, value in fingerprints.items()
        if key in names or key.startswith(("validation/", "teacher/"))
    }


class RunFolder:
    """One attempt at a run: the first, or the next one at the run that the folder holds.

    Args:
        config: the resolved config.
        fingerprints: of each dataset, by source.
        hosts: name of each process's machine.
        num_micro_batches: of each step.
        is_writer: whether this is the main process; elsewhere every call does nothing.
    """

    def __init__(
        self,
        config: PretrainConfig,
        *,
        fingerprints: dict[str, str],
        hosts: Sequence[str],
        num_micro_batches: int,
        is_writer: bool,
    ) -> None:
        self.folder = config.run.folder
        self.num_steps = config.schedule.num_steps
        self.num_steps_done = 0
        self.last_checkpoint: int | None = None  # step of the newest that counts
        self.stop_cause: str | None = None  # set before an attempt's block ends
        self.is_writer = is_writer
        self._earlier_attempts = read_rows(self.folder / "attempts.jsonl")
        # Why the result is not a function of the config alone; also of earlier attempts.
        self.marks = sorted({m for row in self._earlier_attempts for m in row.get("marks", [])})
        if not is_writer:
            return
        for name in ("metrics", "bad_samples", "checkpoints"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        environment = {"dataset_fingerprints": fingerprints} | describe_environment()
        _write_json(self.folder / "environment.json", environment)
        # Last, because its presence says that the folder holds a run.
        write_atomically(self.folder / "config.yaml", to_yaml(config).encode())
        self.attempt = f"{len(self._earlier_attempts) + 1:04d}"
        self._row = {
            "attempt": self.attempt,
            "started": _now(),
            "world_size": len(hosts),
            "strategy": config.engine.strategy,
            "micro_batches": num_micro_batches,
            "hosts": sorted(set(hosts)),
            "from_step": None,
            "to_step": None,
            "ended": None,
            "outcome": "running",
            "marks": self.marks,
        }
        self._write_attempts()

    @contextmanager
    def attempt_from(self, step: int) -> Iterator[None]:
        """Records the step this attempt begins after, and how its block ends."""
        self.num_steps_done = step
        self._record(from_step=step)
        try:
            yield
        except BaseException as error:
            self._record(to_step=self.num_steps_done, ended=_now(), outcome=f"failed: {error!r}")
            self.write_status("failed")
            raise
        is_finished = self.num_steps_done >= self.num_steps
        outcome = "finished" if is_finished else "stopped"
        if self.stop_cause is not None and not is_finished:
            self._record(stop_cause=self.stop_cause)
        self._record(to_step=self.num_steps_done, ended=_now(), outcome=outcome)
        self.write_status(outcome)

    def write_metrics(self, row: dict[str, Any]) -> None:
        """Appends a row of metrics."""
        self._append("metrics", [row])

    def write_bad_samples(self, step: int, entries: Sequence[tuple[str, BadSample]]) -> None:
        """Enters a step's substitutions, (pairing, what was bad), into the ledger."""
        rows = [{"step": step, "pairing": pairing} | asdict(bad) for pairing, bad in entries]
        self._append("bad_samples", rows)

    def read_bad_samples(self) -> list[tuple[str, BadSample]]:
        """The entries of all attempts, to be called on the main process."""
        entries = []
        for path in sorted((self.folder / "bad_samples").glob("*.jsonl")):
            for row in read_rows(path):
                pairing = row.pop("pairing")
                del row["step"]
                entries.append((pairing, BadSample(**row)))
        return entries

    def mark(self, reason: str) -> None:
        """Notes for good, in the attempt's row and all checkpoints, why the run's result is not a
        function of its config alone."""
        if reason not in self.marks:
            self.marks = sorted({*self.marks, reason})
            self._record(marks=self.marks)

    def write_status(self, state: str) -> None:
        """Says where the run stands."""
        if self.is_writer:
            status = {
                "state": state,
                "step": self.num_steps_done,
                "num_steps": self.num_steps,
                "last_checkpoint": self.last_checkpoint,
                "updated": _now(),
            }
            _write_json(self.folder / "status.json", status)

    def _record(self, **values: Any) -> None:
        if self.is_writer:
            self._row |= values
            self._write_attempts()

    def _write_attempts(self) -> None:
        rows = [*self._earlier_attempts, self._row]
        content = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomically(self.folder / "attempts.jsonl", content.encode())

    def _append(self, subfolder: str, rows: Sequence[dict[str, Any]]) -> None:
        if self.is_writer:
            path = self.folder / subfolder / f"{self.attempt}.jsonl"
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none if it does not exist. A last line cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """One row per logged step and per validation, in step order, from all attempts at a run.

    Where attempts overlap, the latest one's row is taken.
    """
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for path in sorted((folder / "metrics").glob("*.jsonl")):
        for row in read_rows(path):
            rows[row["step"], "validation" in row] = row
    return [rows[key] for key in sorted(rows)]


def describe_environment() -> dict[str, Any]:
    """Versions that a result may depend on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(),
        "packages": dict(sorted((d.metadata["Name"], d.version) for d in distributions())),
    }


def _git_commit() -> str | None:
    """The commit of the code that runs, "-dirty" with changes; None outside a checkout."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=here,
            check=True,
            capture_output=True,
            text=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2).encode() + b"\n")


def _now() -> str:
    return datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="seconds")
