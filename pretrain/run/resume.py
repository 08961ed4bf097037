"""Opens the run folder for an attempt and loads the checkpoint that it resumes from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from data_prep.errors import InputError
from pretrain.checkpoint import (
    VerifiedCheckpoint,
    newest_checkpoint,
    restore,
    restore_weights,
)
from pretrain.checkpoints.store import open_store, store_of_run
from pretrain.distributed.collectives import on_main_process, rank
from pretrain.distributed.engine import Engine
from pretrain.run.checkpoint_identity import refuse_checkpoint_of_other_run
from pretrain.run.compatibility import RunIdentity
from pretrain.run.computed_on import warn_of_other_rounding
from pretrain.run.folder import RunFolder, begin_attempt
from pretrain.run.fork import (
    FORK_TAG,
    record_parent,
    refuse_finished_parent,
    refuse_missing_start,
    refuse_other_openings,
)
from pretrain.run.lost_checkpoints import refuse_restart

logger = logging.getLogger(__name__)


def open_run(
    identity: RunIdentity,
    *,
    hosts: Sequence[str],
    num_micro_batches: int,
    computed_on: Mapping[str, str],
) -> RunFolder:
    """Opens the run folder for this attempt; every rank must call it.

    Args:
        identity: config and fingerprints of everything that the run reads.
        hosts: [ranks] machine names.
        num_micro_batches: micro-batches per step.
        computed_on: result of `describe_computation`.

    Raises:
        InputError: on every rank, if the folder holds another run.
    """
    attempt = on_main_process(
        lambda: begin_attempt(
            identity, hosts=hosts, num_micro_batches=num_micro_batches, computed_on=computed_on
        )
    )
    config = identity.config
    return RunFolder(
        config.run.folder, attempt, num_steps=config.schedule.num_steps, is_writer=rank() == 0
    )


def resume(identity: RunIdentity, engine: Engine, run: RunFolder) -> bool:
    """Loads the newest valid checkpoint of this run, or one of its parent if it is a new fork.

    Every rank must call it.

    Returns:
        Whether the run is a new fork, whose first state is not saved yet.

    Raises:
        InputError: if the run is a new fork and its parent has no valid checkpoint to start from,
            or opened other parameters before it. Also if the run has saved checkpoints and none is
            valid, or if the newest belongs to another run.
    """
    config = identity.config.run
    own = newest_checkpoint(open_store(config.checkpoints), is_of_run=run.includes_checkpoint)
    if own is not None:
        on_main_process(lambda: refuse_checkpoint_of_other_run(identity, own.location, own.record))
        restore(engine, own)
        if rank() == 0 and own.record.state.step < run.num_steps:
            warn_of_other_rounding(config.folder, run.attempt, own.record)
        _begin_from(own, run, is_new_fork=False)
        return False
    on_main_process(lambda: refuse_restart(config))
    if config.parent is not None:
        _begin_fork(identity, engine, run)
        return True
    refuse_copied_sources(identity)
    run.begin_from(0, has_checkpoint=False)
    return False


def refuse_copied_sources(identity: RunIdentity) -> None:
    """Checks that a run that begins at step 0 was built from all its sources.

    Raises:
        InputError: if a source is gone; its copy has no weights to begin with.
    """
    if identity.copied_sources:
        raise InputError(
            f"{identity.copied_sources[0]}: cannot be read, and no checkpoint of the run is valid; "
            "restore what this setting names to begin at step 0"
        )


def _begin_fork(identity: RunIdentity, engine: Engine, run: RunFolder) -> None:
    checkpoint = checkpoint_of_parent(identity)
    if identity.config.run.start.schedule == "continue":
        restore(engine, checkpoint)
        _begin_from(checkpoint, run, is_new_fork=True)
        return
    restore_weights(engine, checkpoint)
    for tag in (*checkpoint.record.state.tags, FORK_TAG):
        run.add_tag(tag)
    run.begin_from(0, has_checkpoint=False)
    if rank() == 0:
        logger.info("%s: beginning at step 0, with weights of %s", run.folder, checkpoint.location)


def _begin_from(checkpoint: VerifiedCheckpoint, run: RunFolder, *, is_new_fork: bool) -> None:
    state = checkpoint.record.state
    run.skipped_steps = list(state.skipped_steps)
    for tag in (*state.tags, *([FORK_TAG] if is_new_fork else [])):
        run.add_tag(tag)
    run.begin_from(state.step, has_checkpoint=not is_new_fork)
    if rank() == 0:
        is_done = state.step >= run.num_steps
        text = "%s: finished at %s, nothing is left to do" if is_done else "%s: resuming from %s"
        logger.info(text, run.folder, checkpoint.location)


def checkpoint_of_parent(identity: RunIdentity) -> VerifiedCheckpoint:
    """Returns the checkpoint that a fork starts from and records it in the fork's folder.

    Every rank must call it.

    Raises:
        InputError: if the parent has no valid checkpoint at run.fork.step or at any step, or it
            leaves no step to train. Also if the parent opened other parameters before it.
    """
    run = identity.config.run
    checkpoint = newest_checkpoint(store_of_run(str(run.parent)), step=run.start.step)
    if checkpoint is None:
        refuse_missing_start(run)
    # Again: the parent may have trained further since the fork was created.
    step = checkpoint.record.state.step
    refuse_finished_parent(identity.config, step=step)
    on_main_process(lambda: refuse_other_openings(identity.config, step=step))
    on_main_process(lambda: record_parent(identity, checkpoint))
    return checkpoint
