"""Evaluates each new checkpoint of a run in a separate job, while the run trains.

    python -m eval.watch configs/eval/watch.yaml
    python -m eval.watch configs/eval/watch.yaml checkpoint=runs/mine output=results/mine

The results of a step are written to <output>/step_00001000, and its metrics to the run's
TensorBoard, next to the training curves. Training never waits for an evaluation. A restarted
command continues with the checkpoints not evaluated yet. It ends when the run has finished or, with
wait=false, when all existing checkpoints are evaluated.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import WatchConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(WatchConfig, __doc__)

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import (
    InputError,
    RunError,
)
from eval.config import EvaluateConfig
from eval.tasks.readers import read_tasks
from pretrain.checkpoints.store import StoredCheckpoint, store_of_run
from pretrain.run.attempts import read_attempts
from pretrain.run.status_file import read_status_file

if TYPE_CHECKING:
    from eval.report.curves import EvaluationCurves


logger = logging.getLogger("eval.watch")


def run(config: WatchConfig) -> None:
    """Evaluates every new checkpoint until the run has finished."""
    # Imported here because torch and the model libraries load slowly, and a dry run needs neither.
    from eval.processes import joined_processes
    from eval.report.curves import EvaluationCurves
    from pretrain.distributed.collectives import rank

    check_output_folder(config.output, key="output")
    watched = WatchedRun(config.checkpoint, config.output)
    with joined_processes():
        curves = EvaluationCurves(watched.folder, config.output) if rank() == 0 else None
        poll_seconds = config.poll_seconds if config.wait else None
        for checkpoint in _new_checkpoints(watched, poll_seconds=poll_seconds):
            _evaluate(checkpoint, watched, config, curves)


def _new_checkpoints(
    watched: WatchedRun, *, poll_seconds: float | None
) -> Iterator[StoredCheckpoint]:
    """Yields the checkpoints to evaluate, in the same order in every process.

    Args:
        watched: run and its results.
        poll_seconds: seconds between checks for new checkpoints; None: do not wait for new ones.
    """
    from pretrain.distributed.collectives import on_main_process

    while True:
        # has_finished is read first, so that the last checkpoint of a finished run is not missed.
        has_finished, found = on_main_process(
            lambda: (watched.has_finished(), watched.next_checkpoint())
        )
        if found is not None:
            yield found
        elif has_finished or poll_seconds is None:
            return
        else:
            time.sleep(poll_seconds)


def _evaluate(
    checkpoint: StoredCheckpoint,
    watched: WatchedRun,
    config: WatchConfig,
    curves: EvaluationCurves | None,
) -> None:
    from eval.evaluation import evaluate
    from eval.processes import wait_for_all

    output = watched.output_of(checkpoint.step)
    values = {name: getattr(config, name) for name in EvaluateConfig.model_fields}
    values |= {"checkpoint": Path(checkpoint.location), "output": output}
    try:
        evaluate(EvaluateConfig.model_construct(**values))
    except InputError as error:
        if watched.exists(checkpoint):
            raise
        logger.warning("step %d was deleted before it was evaluated: %s", checkpoint.step, error)
        watched.skip(checkpoint)
        return
    except RunError as error:
        # A later checkpoint may reach a missed goal.
        logger.warning("step %d: %s", checkpoint.step, error)
    wait_for_all()
    if curves is not None:
        curves.add(output)
        if config.embeddings is None:  # these embeddings are for this checkpoint only
            shutil.rmtree(output / "embeddings", ignore_errors=True)


def dry_run(config: WatchConfig) -> None:
    """Checks the files of every task, and prints what would be evaluated."""
    check_output_folder(config.output, key="output")
    watched = WatchedRun(config.checkpoint, config.output)
    say(f"{watched.folder}: {watched.num_missing()} checkpoints to evaluate now")
    found = read_tasks(config.evaluations, skip_missing=config.skip_missing, seed=config.seed)
    for task in found.present:
        say(task.description())


def main() -> int:
    """Runs the command."""
    return run_command(WatchConfig, run=run, dry_run=dry_run, description=__doc__)


class WatchedRun:
    """A run folder, and the results folder of its checkpoints.

    Args:
        folder: run folder.
        output: results folder, with one subfolder per step.

    Raises:
        InputError: if the folder is not a run folder.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        if not (folder / "config.yaml").exists():
            raise InputError(
                f"{folder}: expected a run folder (key: checkpoint), found no config.yaml; "
                "python -m pretrain.train writes it at the start of a run"
            )
        self.folder = folder
        self.output = output
        self._skipped: set[str] = set()

    def output_of(self, step: int) -> Path:
        """Returns the results folder of a step."""
        return self.output / f"step_{step:08d}"

    def next_checkpoint(self) -> StoredCheckpoint | None:
        """Returns the oldest checkpoint without results, from the newest attempt at its step."""
        newest_of = {each.step: each for each in reversed(self._missing())}
        return newest_of[min(newest_of)] if newest_of else None

    def num_missing(self) -> int:
        """Returns the number of steps without results."""
        return len({each.step for each in self._missing()})

    def _missing(self) -> list[StoredCheckpoint]:
        return [
            each
            for each in store_of_run(str(self.folder)).checkpoints()
            if each.location not in self._skipped
            and not (self.output_of(each.step) / "results.json").exists()
        ]

    def exists(self, checkpoint: StoredCheckpoint) -> bool:
        """Returns whether a checkpoint has not been deleted."""
        return checkpoint in store_of_run(str(self.folder)).checkpoints()

    def skip(self, checkpoint: StoredCheckpoint) -> None:
        """Excludes a checkpoint from `next_checkpoint`."""
        self._skipped.add(checkpoint.location)

    def has_finished(self) -> bool:
        """Returns whether the run has finished all its steps."""
        status = read_status_file(self.folder)
        if status:
            return status["state"] == "finished"
        attempts = read_attempts(self.folder)  # of a run whose status is damaged or not written yet
        return bool(attempts) and attempts[-1].outcome == "finished"


if __name__ == "__main__":
    sys.exit(main())
