"""Opens the run folder for an attempt and loads the checkpoint that it resumes from."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from data_prep.errors import InputError
from pretrain.checkpoint import VerifiedCheckpoint, newest_checkpoint, restore
from pretrain.checkpoints.store import open_store, store_of_run
from pretrain.distributed.collectives import on_main_process, rank
from pretrain.distributed.engine import Engine
from pretrain.run.compatibility import RunIdentity
from pretrain.run.folder import RunFolder, begin_attempt
from pretrain.run.fork import FORK_TAG, record_parent, refuse_finished_parent
from pretrain.run.lost_checkpoints import refuse_restart

logger = logging.getLogger(__name__)


def open_run(identity: RunIdentity, *, hosts: Sequence[str], num_micro_batches: int) -> RunFolder:
    """Opens the run folder for this attempt; every rank must call it.

    Args:
        identity: config and fingerprints of everything that the run reads.
        hosts: [ranks] machine names.
        num_micro_batches: micro-batches per step.

    Raises:
        InputError: on every rank, if the folder holds another run.
    """
    attempt = on_main_process(
        lambda: begin_attempt(identity, hosts=hosts, num_micro_batches=num_micro_batches)
    )
    config = identity.config
    return RunFolder(
        config.run.folder, attempt, num_steps=config.schedule.num_steps, is_writer=rank() == 0
    )


def resume(identity: RunIdentity, engine: Engine, run: RunFolder) -> None:
    """Loads the newest valid checkpoint of this run, or of its parent if it is a new fork.

    Every rank must call it.

    Raises:
        InputError: if the run is a fork and its parent has no valid checkpoint, or if the run has
            saved checkpoints and none is valid.
    """
    config = identity.config.run
    own = newest_checkpoint(open_store(config.checkpoints), is_of_run=run.includes_checkpoint)
    if own is None:
        on_main_process(lambda: refuse_restart(config))
    is_fork = own is None and config.parent is not None
    newest = newest_checkpoint_of_parent(identity) if is_fork else own
    if newest is None:
        run.begin_from(0, has_checkpoint=False)
        return
    restore(engine, newest)
    state = newest.record.state
    run.skipped_steps = list(state.skipped_steps)
    for tag in (*state.tags, *([FORK_TAG] if is_fork else [])):
        run.add_tag(tag)
    run.begin_from(state.step, has_checkpoint=not is_fork)
    if rank() == 0:
        is_done = state.step >= run.num_steps
        text = "%s: finished at %s, nothing is left to do" if is_done else "%s: resuming from %s"
        logger.info(text, config.folder, newest.location)


def newest_checkpoint_of_parent(identity: RunIdentity) -> VerifiedCheckpoint:
    """Returns the checkpoint that a fork starts from and records it in the fork's folder.

    Raises:
        InputError: if the parent has no valid checkpoint, or none before the fork's last step.
    """
    parent = identity.config.run.parent
    newest = newest_checkpoint(store_of_run(str(parent)))
    if newest is None:
        raise InputError(
            f"{parent}: expected a run with a valid checkpoint to start from (run.fork, "
            "run.parent), found none; train the parent until it saves one"
        )
    # Again: the parent may have trained further since the fork was created.
    refuse_finished_parent(identity.config, step=newest.record.state.step)
    on_main_process(lambda: record_parent(identity, newest))
    return newest
