"""Decides for slurm/pretrain.sbatch whether the Slurm job of a run is requeued.

    python -m pretrain.requeue configs/pretrain/demo.yaml [section.key=value ...]

Takes the arguments of pretrain.train. Exit status 0: the job is requeued. 1: it is not, for the
printed reason. 3: this start has finished the run, regardless of its processes' exit statuses.

A run that a signal stopped is requeued. A run that failed is requeued too, since a node may be the
cause, unless its loss is not finite. A run is not requeued if

    - its last three attempts saved no checkpoint at a later step, or
    - its job was started three times without claiming an attempt.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from pretrain.config import PretrainConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(PretrainConfig, __doc__)

import os
import sys
from collections.abc import Mapping, Sequence

from data_prep.errors import RunError
from pretrain.checkpoints.store import store_of_run
from pretrain.run.attempts import (
    Attempt,
    DivergedError,
    is_of_this_start,
    read_attempts,
    restarts_of_job,
)
from pretrain.run.end_causes import causes_of_end
from pretrain.run.fork import config_of_fork
from pretrain.run.signals import STOP_SIGNALS

ATTEMPTS_WITHOUT_A_STEP = 3
STATUS_OF_FINISHED = 3


def run(config: PretrainConfig) -> None:
    """Prints whether the job is requeued; exits with status 1 or 3 if not."""
    folder = config_of_fork(config).run.folder
    checkpoints = store_of_run(str(folder)).checkpoints()
    last_checkpoint = checkpoints[0].step if checkpoints else 0
    attempts = read_attempts(folder)
    if attempts:
        for cause in causes_of_end(folder, attempts, len(attempts) - 1):
            say(f"attempt {attempts[-1].attempt}: {cause}")
    try:
        check_starts_without_attempt(attempts, os.environ)
        reason = reason_to_continue(attempts, last_checkpoint=last_checkpoint)
    except RunError as error:
        say(f"{folder}: not requeued: {error}")
        # If an earlier start finished the run, this start claimed no attempt and has failed.
        is_newest = bool(attempts) and is_of_this_start(attempts[-1], os.environ)
        is_finished = is_newest and attempts[-1].outcome == "finished"
        sys.exit(STATUS_OF_FINISHED if is_finished else 1)
    say(f"{folder}: requeued: {reason}")


def check_starts_without_attempt(
    attempts: Sequence[Attempt], environment: Mapping[str, str]
) -> None:
    """Raises an error if the last starts of a job ended before claiming an attempt.

    Args:
        attempts: all attempts at the run, oldest first.
        environment: environment variables of the job.

    Raises:
        RunError: if there are at least `ATTEMPTS_WITHOUT_A_STEP` such starts.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None or not attempts:
        return
    started = restarts_of_job(environment) + 1
    starts = [attempt.job_restarts + 1 for attempt in attempts if attempt.job == job]
    without_attempt = started - max(starts, default=0)
    if without_attempt >= ATTEMPTS_WITHOUT_A_STEP:
        raise RunError(
            f"the last {without_attempt} starts of job {job} ended before the run started; see "
            "the job's log"
        )


def reason_to_continue(attempts: Sequence[Attempt], *, last_checkpoint: int) -> str:
    """Returns why a run is restarted.

    Args:
        attempts: all attempts of the run, oldest first.
        last_checkpoint: step from which the next attempt would resume.

    Raises:
        RunError: if the run is not restarted; the message is the reason.
    """
    if not attempts:
        raise RunError("no attempt has claimed the run; see the job's log")
    newest = attempts[-1]
    if newest.outcome == "finished":
        raise RunError("the run has finished")
    if newest.outcome == "superseded":
        raise RunError("a newer attempt is running")
    signals = [number.name for number in STOP_SIGNALS]
    if newest.outcome == "stopped" and newest.stop_cause not in signals:
        raise RunError(f"the run was stopped by {newest.stop_cause or 'its config'}")
    if newest.outcome.startswith(f"failed: {DivergedError.__name__}"):
        raise RunError(f"the run cannot continue without a change: {newest.outcome}")
    last = attempts[-ATTEMPTS_WITHOUT_A_STEP:]
    starts = [each.from_step for each in last if each.from_step is not None]
    # Only saved steps count as progress: the next attempt repeats all later steps, and an attempt
    # that was killed could not record its last step.
    has_saved = last_checkpoint > min(starts, default=last_checkpoint)
    if len(last) == ATTEMPTS_WITHOUT_A_STEP and not has_saved:
        raise RunError(
            f"none of the last {len(last)} attempts saved a later step; the newest: "
            f"{newest.outcome} (for details: python -m pretrain.status)"
        )
    if newest.outcome == "stopped":
        return f"stopped by {newest.stop_cause} at step {newest.to_step}"
    return f"attempt {newest.attempt}: {newest.outcome}"


def main() -> int:
    """Runs the command and returns its exit status."""
    return run_command(PretrainConfig, run=run, dry_run=lambda _: None, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
