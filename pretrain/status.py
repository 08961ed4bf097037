"""Prints the status of a run, on any machine that can read its folder, such as a login node.

    python -m pretrain.status runs/mine

Prints the state of the run, its progress with the estimated end, the latest metrics, the
checkpoints, and how each attempt ended. Only reads files; needs neither a GPU nor torch.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from data_prep.command import parse_arguments, print_error, say
from data_prep.errors import ConfigError, InputError, RunError
from pretrain.checkpoints.store import store_of_run
from pretrain.config import END_FRACTION, Engine
from pretrain.monitoring.progress_log import in_words
from pretrain.run.attempts import Attempt, read_attempts, read_metrics
from pretrain.run.end_causes import causes_of_end
from pretrain.run.status_file import read_status_file
from pretrain.stored_config import CONFIG_FILE, read_values_of_run

NUM_ROWS = 20  # number of newest metrics rows that determine the pace
TIMEOUT_KEYS = ("timeout_seconds", "start_timeout_seconds")  # after and before the first step
MAX_CONFIG_NUMBER = 1e10  # larger numbers in a stored config are taken as damage
MAX_OUTCOME_CHARACTERS = 160


@dataclass(frozen=True)
class RunStatus:
    """Status of a run according to its files."""

    folder: Path
    state: str
    detail: str  # reason for the state; may be empty
    step: int
    num_steps: int | None
    attempts: list[Attempt]
    rows: list[dict[str, Any]]  # rows of metrics
    checkpoints: list[int]  # steps, newest first
    updated: datetime | None

    def seconds_left(self) -> float | None:
        """Estimates the time until the last step from the latest metrics; None without metrics."""
        rows = [row for row in self.rows if "samples_per_second" in row][-NUM_ROWS:]
        if self.num_steps is None or len(rows) < 2:
            return None
        steps = rows[-1]["step"] - rows[0]["step"]
        samples = rows[-1]["samples_seen"] - rows[0]["samples_seen"]
        if not steps or not samples:
            return None
        pace = statistics.median(row["samples_per_second"] for row in rows) * steps / samples
        return (self.num_steps - self.step) / pace if pace else None


def read_status(folder: Path, *, at: datetime) -> RunStatus:
    """Reads the status of a run from its files.

    Args:
        folder: run folder.
        at: current time.

    Raises:
        InputError: if the folder is not a run folder, or its config is damaged.
    """
    if not (folder / CONFIG_FILE).exists():
        raise InputError(
            f"{folder}: expected a run folder, found no config.yaml in it; "
            "python -m pretrain.train creates it when a run starts"
        )
    config = read_values_of_run(folder)
    attempts = read_attempts(folder)
    written = read_status_file(folder)
    rows = read_metrics(folder)
    updated = datetime.fromisoformat(written["updated"]) if written else None
    timeouts = {
        key: _number(config, "engine", key, Engine.model_fields[key].default, folder=folder)
        for key in TIMEOUT_KEYS
    }
    state, detail = _state(attempts, written, at=at, timeouts=timeouts)
    return RunStatus(
        folder=folder,
        state=state,
        detail=detail,
        step=written.get("step", 0),
        num_steps=written.get("num_steps")
        or _number(config, "schedule", "num_steps", None, folder=folder),
        attempts=attempts,
        rows=rows,
        checkpoints=sorted({each.step for each in store_of_run(str(folder)).checkpoints()})[::-1],
        updated=updated,
    )


def _number(
    config: dict[str, Any], section: str, key: str, default: int | None, *, folder: Path
) -> int | None:
    value = config.get(section, {}).get(key, default)
    if value is not None and not (isinstance(value, int | float) and 0 < value < MAX_CONFIG_NUMBER):
        raise ConfigError(
            f"{folder / CONFIG_FILE}: {section}.{key}: expected a positive number, found {value!r}"
        )
    return value


def _state(
    attempts: Sequence[Attempt],
    written: dict[str, Any],
    *,
    at: datetime,
    timeouts: dict[str, int | None],
) -> tuple[str, str]:
    if not attempts:
        return "not started", "no attempt has claimed the run"
    newest = attempts[-1]
    if newest.outcome != "running":
        return newest.outcome, f"by {newest.stop_cause}" if newest.stop_cause else ""
    is_own = written.get("attempt") == newest.attempt
    last_heartbeat = datetime.fromisoformat(written["updated"] if is_own else newest.started)
    timeout = timeouts[TIMEOUT_KEYS[0] if is_own else TIMEOUT_KEYS[1]] or MAX_CONFIG_NUMBER
    # By then, the hang watch has ended all processes of a run that hangs.
    if at - last_heartbeat > timedelta(seconds=END_FRACTION * timeout):
        return "silent", (
            f"attempt {newest.attempt} has written nothing for {in_words(at - last_heartbeat)}: "
            "its nodes were lost or it was killed; start the run again to resume it"
        )
    if not is_own:
        return "starting", f"attempt {newest.attempt} has not finished a step yet"
    return "running", ""


def status_lines(status: RunStatus, *, at: datetime) -> list[str]:
    """Formats a status as lines of text."""
    state = f"{status.state}: {status.detail}" if status.detail else status.state
    lines = [f"{status.folder}: {state}", f"  {_progress(status, at=at)}"]
    lines += [f"  {line}" for line in _newest_metrics(status.rows)]
    if status.checkpoints:
        lines.append("  checkpoints: step " + ", ".join(f"{step:,}" for step in status.checkpoints))
    else:
        lines.append("  no checkpoint yet")
    lines.append(f"attempts: {len(status.attempts)}")
    for number, attempt in enumerate(status.attempts):
        lines.append(_attempt_line(attempt))
        causes = causes_of_end(status.folder, status.attempts, number)
        lines += [f"        {cause}" for cause in causes]
    return lines


def _progress(status: RunStatus, *, at: datetime) -> str:
    words = [f"step {status.step:,}"]
    if status.num_steps:
        words.append(f"of {status.num_steps:,} ({100 * status.step / status.num_steps:.1f} %)")
    if status.updated is not None:
        words.append(f"as of {in_words(at - status.updated)} ago")
    left = status.seconds_left()
    if left is not None and status.state == "running":
        end = (at + timedelta(seconds=left)).astimezone()
        words.append(f"; ends in {in_words(timedelta(seconds=left))}, {end:%Y-%m-%d %H:%M}")
    return " ".join(words).replace(" ;", ";")


def _newest_metrics(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    steps = [row for row in rows if "samples_per_second" in row]
    if steps:
        row = steps[-1]
        losses = ", ".join(
            f"{name} loss {value:.4g}" for name, value in row.get("loss", {}).items()
        )
        pace = f"{row['samples_per_second']:,.0f} samples/s"
        wait = f"waiting for data {100 * row['data_wait_share']:.0f} %"
        lines.append(", ".join(filter(None, (losses, pace, wait))))
    validations = [row for row in rows if "validation" in row]
    if validations:
        row = validations[-1]
        for kind in ("validation", "validation_ema"):
            losses = "; ".join(
                f"{name} loss {values['loss']:.4g}"
                for name, values in row.get(kind, {}).items()
                if "loss" in values
            )
            if kind in row:
                lines.append(f"{kind} at step {row['step']:,}: {losses}")
    return lines


def _attempt_line(attempt: Attempt) -> str:
    hosts = sorted(set(attempt.hosts))
    shown = ", ".join(hosts[:3]) + (f" and {len(hosts) - 3} others" if len(hosts) > 3 else "")
    steps = "no step"
    if attempt.from_step is not None:
        end = "..." if attempt.to_step is None else f"{attempt.to_step:,}"
        steps = f"steps {attempt.from_step:,} to {end}"
    cause = f" by {attempt.stop_cause}" if attempt.stop_cause else ""
    job = "" if attempt.job is None else f", job {attempt.job}"
    if attempt.job_restarts:
        job += f" restarted {attempt.job_restarts} times"
    outcome = attempt.outcome  # the attempt's file holds the full message of a failure
    if len(outcome) > MAX_OUTCOME_CHARACTERS:
        outcome = f"{outcome[:MAX_OUTCOME_CHARACTERS]} ..."
    return (
        f"  {attempt.attempt}  {attempt.started}  {attempt.world_size} processes, "
        f"{attempt.strategy}, on {shown}{job}: {steps}, {outcome}{cause}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--dry-run", action="store_true", help="only check that it is a run folder")
    options = parse_arguments(parser, arguments)
    now = datetime.now(UTC)
    try:
        status = read_status(options.run, at=now)
        if not options.dry_run:
            say("\n".join(status_lines(status, at=now)))
    except (InputError, RunError, OSError) as error:
        print_error(error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
