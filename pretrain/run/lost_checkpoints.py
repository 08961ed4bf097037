"""Refuses a start that would begin again at step 0 although the run has saved checkpoints.

The run folder records what was saved: its config names the folder of the checkpoints, and its
attempts, metrics and status name their steps.
"""

from __future__ import annotations

import logging
from pathlib import Path

from data_prep.errors import ConfigError, InputError
from data_prep.storage.sealed import DamagedFileError
from pretrain.checkpoints.store import CheckpointStore, open_store, store_of_run
from pretrain.config import Run
from pretrain.run.attempts import last_valid_step, read_attempts, read_metrics
from pretrain.run.compatibility import holds_run
from pretrain.run.fork import PARENT_FILE, first_step_of_fork, parse_parent
from pretrain.run.status_file import read_status_file

logger = logging.getLogger(__name__)


def refuse_other_checkpoints(run: Run) -> None:
    """Checks that the folder of the checkpoints still holds those of the run.

    Raises:
        ConfigError: if run.checkpoint_folder was changed, and the earlier folder holds newer ones.
        InputError: if the run has saved checkpoints, and they are gone.
    """
    if not holds_run(run.folder):
        return
    here, former = open_store(run.checkpoints), store_of_run(str(run.folder))
    newest_here = newest_former = _newest_step(here)
    if former.folder != here.folder:
        try:
            newest_former = _newest_step(former)
        except OSError as error:
            logger.warning(
                "%s: the former folder of the checkpoints cannot be read (%s), so that it is not "
                "known whether it holds newer ones than %s",
                former.folder,
                error,
                here.folder,
            )
    if newest_former > newest_here:
        found = "none" if newest_here < 0 else f"step {newest_here}"
        raise ConfigError(
            f"run.checkpoint_folder={run.checkpoint_folder or 'null'}: expected the checkpoints of "
            f"this run up to step {newest_former}, found {found}; they are in {former.folder}: set "
            f"run.checkpoint_folder={former.folder}, or move its step_* folders to {here.folder}"
        )
    if newest_here < 0:
        refuse_restart(run)


def refuse_restart(run: Run) -> None:
    """Checks that a run without a usable checkpoint has never saved one.

    Raises:
        InputError: if it has.
    """
    step = _last_saved_step(run)
    if step is None:
        return
    place = run.checkpoints
    if "://" not in place:
        place = str(Path(place).absolute())
    raise InputError(
        f"{place}: expected the checkpoints of this run, which has saved one at step {step} (see "
        f"{run.folder}), found no valid one; restore them, or set run.checkpoint_folder to their "
        f"folder; to begin again at step 0, set run.folder to a new folder or delete {run.folder}"
    )


def _newest_step(store: CheckpointStore) -> int:
    """-1 if there is no checkpoint"""
    return max((each.step for each in store.checkpoints()), default=-1)


def _last_saved_step(run: Run) -> int | None:
    """Step of the newest checkpoint that the files of the run folder mention; None if none."""
    attempts = read_attempts(run.folder)
    first_step = _first_step(run)
    steps = [each.from_step for each in attempts if (each.from_step or 0) > first_step]
    for row in read_metrics(run.folder):
        steps += [save["step"] for save in row.get("saves", ())]
    status = read_status_file(run.folder)
    saved = status.get("last_checkpoint")
    # A superseded attempt may have saved a step that is not part of the run's history.
    if saved is not None and saved <= last_valid_step(attempts, status["attempt"]):
        steps.append(saved)
    return max(steps, default=None)


def _first_step(run: Run) -> float:
    """Steps done when the run was created: those of its parent if it continues them."""
    if run.parent is None:
        return 0
    try:
        return first_step_of_fork(parse_parent((run.folder / PARENT_FILE).read_bytes()))
    except (FileNotFoundError, DamagedFileError):
        return float("inf")
