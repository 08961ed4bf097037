"""Steps loaded ahead of the training loop: by a loader process, or by the training process itself.

With `loading.num_workers` threads, a loader process fills shared buffers (loader_process). With 0,
the training process loads a step when it asks for it. The batches are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch

from data_prep.errors import RunError
from pretrain.cache.node import fetching_ahead
from pretrain.data.batch import StepBatch
from pretrain.data.loader_process import LoaderProcess
from pretrain.data.step_loader import StepLoader
from pretrain.settings.data import Loading


class LoadSteps(Protocol):
    """Loads the steps first_step to last_step - 1, in order."""

    def __call__(
        self, loader: StepLoader, *, first_step: int, last_step: int, is_pinned: bool = False
    ) -> Iterator[StepBatch]:
        """Yields the steps; a batch is valid until the next one is asked for.

        Args:
            loader: reader of this rank's rows.
            first_step: first step to load.
            last_step: step before which loading ends.
            is_pinned: whether a GPU copies from the batches' memory by itself.

        Raises:
            InputError: if a sample and its substitutes cannot be decoded.
            RunError: if a shard cannot be read now.
        """


@contextmanager
def start_loader(loading: Loading) -> Iterator[LoadSteps]:
    """Starts what loads steps, and ends it with the block.

    Enter it before anything else is started: the loader process must inherit no thread, connection
    or GPU of this one.
    """
    if loading.num_workers == 0:
        yield partial(_load, _in_this_process)
        return
    process = LoaderProcess(loading)
    try:
        yield partial(_load, process.load)
    finally:
        process.close()


def _load(load: LoadSteps, loader: StepLoader, **steps: Any) -> Iterator[StepBatch]:
    """Adds what to do to the error of a shard that cannot be read."""
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
    """Loads with one thread of torch: to resize small pictures, more threads only cost time."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return loader.load(step)
    finally:
        torch.set_num_threads(num_threads)
