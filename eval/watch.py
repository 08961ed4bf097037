"""Evaluates each new checkpoint of a run while it trains, as a job of its own.

    python -m eval.watch configs/eval/watch.yaml
    python -m eval.watch configs/eval/watch.yaml checkpoint=runs/mine output=results/mine

Results of a step go into <output>/step_00001000, and its metrics into the run's TensorBoard, beside
the curves of training, which never waits. Started again, it goes on with what is not evaluated yet.
It ends when the run has finished, or, with wait=false, when all that is there is evaluated.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import WatchConfig

if __name__ == "__main__":  # --help and a wrong config end here, before the slow imports
    check_command_line(WatchConfig, __doc__)

import json
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

if TYPE_CHECKING:
    from eval.report.curves import EvaluationCurves


logger = logging.getLogger("eval.watch")


def run(config: WatchConfig) -> None:
    """Evaluates every checkpoint that comes, until the run has finished."""
    # Imported here: torch and the model libraries take seconds to load, and a dry run needs none.
    from eval.processes import joined_processes
    from eval.report.curves import EvaluationCurves
    from pretrain.distributed.collectives import rank

    check_output_folder(config.output, key="output")
    watched = WatchedRun(config.checkpoint, config.output)
    with joined_processes():
        curves = EvaluationCurves(watched.folder, config.output) if rank() == 0 else None
        for checkpoint in _new_checkpoints(watched, config):
            _evaluate(checkpoint, watched, config, curves)


def _new_checkpoints(watched: WatchedRun, config: WatchConfig) -> Iterator[StoredCheckpoint]:
    """The same ones, in the same order, in every process."""
    from pretrain.distributed.collectives import on_main_process

    while True:
        # Asked before the checkpoints are: what the run saved last is then among them.
        is_over, found = on_main_process(lambda: (watched.is_over(), watched.next_checkpoint()))
        if found is not None:
            yield found
        elif is_over or not config.wait:
            return
        else:
            time.sleep(config.poll_seconds)


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
        if watched.is_there(checkpoint):
            raise
        logger.warning("step %d was deleted before it was evaluated: %s", checkpoint.step, error)
        watched.pass_over(checkpoint)
        return
    except RunError as error:
        logger.warning("step %d: %s", checkpoint.step, error)  # a goal; what comes may reach it
    wait_for_all()
    if curves is not None:
        curves.add(output)
        if config.embeddings is None:  # of this checkpoint alone
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
    """The command."""
    return run_command(WatchConfig, run=run, dry_run=dry_run, description=__doc__)


class WatchedRun:
    """A run folder, and the folder of its evaluations.

    Args:
        folder: of the run.
        output: that holds a folder for each step.

    Raises:
        InputError: there is no run.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        if not (folder / "config.yaml").exists():
            raise InputError(
                f"{folder}: expected the folder of a run (key: checkpoint), found no config.yaml; "
                "python -m pretrain.train makes one as it starts"
            )
        self.folder = folder
        self.output = output
        self._passed_over: set[str] = set()

    def output_of(self, step: int) -> Path:
        """Where the results of a step go."""
        return self.output / f"step_{step:08d}"

    def next_checkpoint(self) -> StoredCheckpoint | None:
        """The oldest that is not evaluated; of one step, what the newest attempt saved."""
        newest_of = {each.step: each for each in reversed(self._missing())}
        return newest_of[min(newest_of)] if newest_of else None

    def num_missing(self) -> int:
        """How many steps are not evaluated."""
        return len({each.step for each in self._missing()})

    def _missing(self) -> list[StoredCheckpoint]:
        return [
            each
            for each in store_of_run(str(self.folder)).checkpoints()
            if each.location not in self._passed_over
            and not (self.output_of(each.step) / "results.json").exists()
        ]

    def is_there(self, checkpoint: StoredCheckpoint) -> bool:
        """Whether a checkpoint has not been deleted."""
        return checkpoint in store_of_run(str(self.folder)).checkpoints()

    def pass_over(self, checkpoint: StoredCheckpoint) -> None:
        """Never returns it again."""
        self._passed_over.add(checkpoint.location)

    def is_over(self) -> bool:
        """Whether the run has done all its steps."""
        try:
            return json.loads((self.folder / "status.json").read_text())["state"] == "finished"
        except (OSError, ValueError, KeyError):  # not written yet
            return False


if __name__ == "__main__":
    sys.exit(main())
