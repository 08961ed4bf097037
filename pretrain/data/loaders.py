"""Who reads the steps of a rank ahead of its training loop; the batches are the same.

itself        the training process, when it asks for a step (num_workers: 0)
threads       in a process of their own, filling shared buffers (loader_process)
processes     torch's DataLoader, each of whose workers reads whole steps
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from data_prep.errors import InputError, RunError
from pretrain.cache.node import fetching_ahead
from pretrain.config import Loading
from pretrain.data.batch import StepBatch
from pretrain.data.loader_process import LoaderProcess
from pretrain.data.loader_threads import ignore_signals
from pretrain.data.step_loader import StepLoader


class LoadSteps(Protocol):
    """Gives the steps first_step to last_step - 1 of a loader, in order."""

    def __call__(
        self, loader: StepLoader, *, first_step: int, last_step: int, is_pinned: bool = False
    ) -> Iterator[StepBatch]:
        """
        Args:
            loader: reader of this rank's rows.
            first_step: the first that is wanted.
            last_step: the first that is not.
            is_pinned: let a GPU copy the batches by itself.

        Raises:
            InputError: samples and their substitutes cannot be decoded.
            RunError: a shard cannot be read now.
        """


@contextmanager
def start_loader(loading: Loading) -> Iterator[LoadSteps]:
    """What loads steps as the settings say, until the end of the block.

    To be entered before anything else is started: a loader process must hold no thread, connection
    or GPU of this one. A batch holds until the next one is asked for.
    """
    if loading.num_workers == 0:
        yield partial(_load, _in_this_process)
    elif loading.runtime == "processes":
        yield partial(_load, partial(_in_worker_processes, loading))
    else:
        process = LoaderProcess(loading)
        try:
            yield partial(_load, process.load)
        finally:
            process.close()


def _load(load: LoadSteps, loader: StepLoader, **steps: Any) -> Iterator[StepBatch]:
    """Says what to do when a shard cannot be read."""
    try:
        yield from load(loader, **({"is_pinned": False} | steps))
    except OSError as error:
        raise RunError(
            f"cannot read a shard: {error}; nothing was skipped: start again when it can be "
            "read, and the run goes on from its newest checkpoint"
        ) from None


def _in_this_process(
    loader: StepLoader, *, first_step: int, last_step: int, is_pinned: bool
) -> Iterator[StepBatch]:
    with fetching_ahead(loader.node, first_step=first_step) as progress:
        for step in range(first_step, last_step):
            batch = _load_in_one_thread(loader, step)
            progress.publish(step + 1)
            yield batch.pin_memory() if is_pinned else batch


def _load_in_one_thread(loader: StepLoader, step: int) -> StepBatch:
    """Resizing small pictures in several threads wastes all but one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return loader.load(step)
    finally:
        torch.set_num_threads(num_threads)


def _in_worker_processes(
    loading: Loading, loader: StepLoader, *, first_step: int, last_step: int, is_pinned: bool
) -> Iterator[StepBatch]:
    batches = DataLoader(
        _Steps(loader),
        batch_size=None,
        sampler=range(first_step, last_step),
        num_workers=loading.num_workers,
        prefetch_factor=loading.batches_ahead,
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        pin_memory=is_pinned,
        # Libraries of remote file systems, which this process has used, do not survive a fork.
        multiprocessing_context="fork" if loader.cache is None else "spawn",
    )
    with fetching_ahead(loader.node, first_step=first_step) as progress:
        for batch in batches:
            if isinstance(batch, Exception):
                raise batch
            progress.publish(batch.step + 1)
            yield batch


class _Steps:
    """A dataset for torch's DataLoader, whose item t is step t.

    An item may be the error that prevents it: raised in a worker process, its message would be
    wrapped in a traceback.
    """

    def __init__(self, loader: StepLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return self.loader.schedule.num_steps

    def __getitem__(self, step: int) -> StepBatch | InputError | OSError:
        try:
            return self.loader.load(step)
        except (InputError, OSError) as error:
            return error


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(worker: int) -> None:
    ignore_signals()
    torch.set_num_threads(1)
