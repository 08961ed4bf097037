"""The loader process of each rank, whose threads fill a ring of shared buffers.

    training process                        loader process
    load(loader, steps)   -- loader, memory --->   cuts each step into chunks of rows
                          <-- step, slot ----      threads read, decode and tokenise a chunk each
    uses the slot         ---- slot is free -->    which is then filled with a later step

Decoders, resizing and file reads release Python's global lock, so threads use as many cores as
processes would. No batch is copied between processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.reduction import send_handle
from typing import Any

import torch
from torch import Tensor

from data_prep.errors import RunError
from pretrain.data.batch import StepBatch, StreamBuffers
from pretrain.data.loader_threads import LoadRequest, StepMessage, serve
from pretrain.data.step_loader import StepLoader
from pretrain.settings.data import Loading, StreamName
from pretrain.settings.segments import value_at


class LoaderProcess:
    """Handle of a loader process, which it starts at once.

    The process is forked: create it before this process has threads, connections or a GPU.

    Args:
        loading: section `loading`.
    """

    def __init__(self, loading: Loading) -> None:
        self.num_threads = loading.num_workers
        self.num_slots = loading.batches_ahead + 1  # one is in use
        context = multiprocessing.get_context("fork")
        self._pipe, other_end = context.Pipe()
        self._process = context.Process(
            target=serve, args=(other_end, os.getpid()), name="isopair-loader"
        )
        self._process.start()
        other_end.close()

    def load(
        self, loader: StepLoader, *, first_step: int, last_step: int, is_pinned: bool
    ) -> Iterator[StepBatch]:
        """Yields steps in order; a batch's tensors are valid until the next one is asked for.

        Call it once.

        Args:
            loader: reader of this rank's rows.
            first_step: first step to load.
            last_step: step before which loading ends.
            is_pinned: whether a GPU copies from the buffers by itself.

        Raises:
            InputError, OSError: as `StepLoader.load`.
            RunError: if the process died.
        """
        request = LoadRequest(loader, first_step, last_step, self.num_threads, self.num_slots)
        descriptor = os.memfd_create("isopair-batches")
        os.ftruncate(descriptor, request.slot_bytes * request.num_slots)
        self._send(request)
        send_handle(self._pipe, descriptor, self._process.pid)
        memory, slots = request.map_slots(descriptor)
        if is_pinned:
            _pin(memory)
        arrived: dict[int, StepMessage] = {}
        for step in range(first_step, last_step):
            while step not in arrived:
                message = self._receive()
                arrived[message.step] = message
            message = arrived.pop(step)
            if message.error is not None:
                raise message.error
            buffers = value_at(slots[message.slot], message.step)
            yield _batch(loader, message, buffers)
            self._send(message.slot)

    def _send(self, value: Any) -> None:
        try:
            self._pipe.send(value)
        except (BrokenPipeError, ConnectionResetError):
            raise self._death() from None

    def _receive(self) -> StepMessage:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._death() from None

    def _death(self) -> RunError:
        self._process.join()
        code = self._process.exitcode
        cause = signal.Signals(-code).name if code and code < 0 else f"status {code}"
        return RunError(
            f"the loader process of this rank ended with {cause}; SIGKILL mostly means that "
            "memory ran out: lower loading.batches_ahead; nothing is lost, start again"
        )

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.join()
        self._pipe.close()


def _batch(
    loader: StepLoader, message: StepMessage, buffers: dict[StreamName, StreamBuffers]
) -> StepBatch:
    return StepBatch(
        message.step,
        {
            name: buffers[name]
            .first(message.num_rows[name])
            .to_batch(first_slot=loader.first_slot(name), **vars(rows))
            for name, rows in message.rows.items()
        },
        loader.schedule.streams_of_step(message.step),
    )


def _pin(memory: Tensor) -> None:
    """Pins memory that torch has not allocated, so that a GPU can copy from it by itself."""
    status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(status) != 0:
        raise RunError(
            f"cannot pin {memory.numel() / 1e9:.2f} GB of loader memory (CUDA error {status}); "
            "lower loading.batches_ahead, or raise the limit of locked memory (ulimit -l)"
        )
