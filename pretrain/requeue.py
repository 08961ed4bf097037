"""Decides whether the Slurm job of a run is to be queued again; slurm/pretrain.sbatch asks it.

    python -m pretrain.requeue configs/pretrain/demo.yaml [section.key=value ...]

Takes the arguments of pretrain.train. Exit status 0: queue the job again; 1: do not, and why;
3: this start has finished the run, whatever status its processes ended with.

A run that heard a signal goes on. One that failed goes on too, for a node may be to blame, unless
its loss is not finite; and none goes on whose last three attempts saved no step further, or whose
job was started three times without an attempt at the run.
"""

from __future__ import annotations

from data_prep.command import check_command_line, run_command, say
from pretrain.config import PretrainConfig

if __name__ == "__main__":  # --help and a wrong config end here, before the slow imports
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
    """Says whether the job is to be queued again; ends with another status than 0 if not."""
    folder = config_of_fork(config).run.folder
    checkpoints = store_of_run(str(folder)).checkpoints()
    last_checkpoint = checkpoints[0].step if checkpoints else 0
    attempts = read_attempts(folder)
    if attempts:
        for cause in causes_of_end(folder, attempts, len(attempts) - 1):
            say(f"attempt {attempts[-1].attempt}: {cause}")
    try:
        refuse_starts_without_attempt(attempts, os.environ)
        reason = reason_to_go_on(attempts, last_checkpoint=last_checkpoint)
    except RunError as error:
        say(f"{folder}: not queued again: {error}")
        # An earlier job may have finished it: then this one, which came to no attempt, has failed.
        ended_it = bool(attempts) and is_of_this_start(attempts[-1], os.environ)
        is_finished = ended_it and attempts[-1].outcome == "finished"
        sys.exit(STATUS_OF_FINISHED if is_finished else 1)
    say(f"{folder}: queued again: {reason}")


def refuse_starts_without_attempt(
    attempts: Sequence[Attempt], environment: Mapping[str, str]
) -> None:
    """
    Args:
        attempts: all at the run, oldest first.
        environment: of the job.

    Raises:
        RunError: as many starts of the job as `ATTEMPTS_WITHOUT_A_STEP` ended before they claimed
            an attempt.
    """
    job = environment.get("SLURM_JOB_ID")
    if job is None or not attempts:
        return
    started = restarts_of_job(environment) + 1
    of_job = [attempt.job_restarts + 1 for attempt in attempts if attempt.job == job]
    in_vain = started - max(of_job, default=0)
    if in_vain >= ATTEMPTS_WITHOUT_A_STEP:
        raise RunError(
            f"the last {in_vain} starts of job {job} ended before the run began; its log says why"
        )


def reason_to_go_on(attempts: Sequence[Attempt], *, last_checkpoint: int) -> str:
    """Why a run is to be started again.

    Args:
        attempts: all at the run, oldest first.
        last_checkpoint: step that the next one would begin from.

    Raises:
        RunError: it is not to be; it says why.
    """
    if not attempts:
        raise RunError("no attempt has claimed the run: see what it said when it started")
    newest = attempts[-1]
    if newest.outcome == "finished":
        raise RunError("the run has finished")
    if newest.outcome == "superseded":
        raise RunError("a newer attempt is at work")
    signals = [number.name for number in STOP_SIGNALS]
    if newest.outcome == "stopped" and newest.stop_cause not in signals:
        raise RunError(f"the run was told to stop by {newest.stop_cause or 'its config'}")
    if newest.outcome.startswith(f"failed: {DivergedError.__name__}"):
        raise RunError(f"the run cannot go on by itself: {newest.outcome}")
    last = attempts[-ATTEMPTS_WITHOUT_A_STEP:]
    starts = [each.from_step for each in last if each.from_step is not None]
    # By what is saved: steps that the next attempt takes again are no progress, and one that was
    # killed could not say how far it came.
    has_saved = last_checkpoint > min(starts, default=last_checkpoint)
    if len(last) == ATTEMPTS_WITHOUT_A_STEP and not has_saved:
        raise RunError(
            f"none of the last {len(last)} attempts came a step further; the newest: "
            f"{newest.outcome} (python -m pretrain.status tells more)"
        )
    if newest.outcome == "stopped":
        return f"stopped by {newest.stop_cause} at step {newest.to_step}"
    return f"attempt {newest.attempt}: {newest.outcome}"


def main() -> int:
    """The command."""
    return run_command(PretrainConfig, run=run, dry_run=lambda _: None, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
