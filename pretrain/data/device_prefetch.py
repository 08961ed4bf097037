"""Prefetching to the device: the next batch is copied while the current one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Protocol

import torch

from pretrain.data.batch import StepBatch


class BatchCopier(Protocol):
    """Copies batches to a device."""

    def copy(self, batch: StepBatch) -> StepBatch:
        """Returns the batch on the device, after which its memory on the host may be reused."""

    def hand_over(self, batch: StepBatch) -> None:
        """Prepares a copied batch for use; the computing thread calls it."""


class CudaCopier:
    """Copier with its own stream, so that copies overlap with computation.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def copy(self, batch: StepBatch) -> StepBatch:
        with torch.cuda.stream(self.stream):
            copied = batch.to(self.device)
        self.stream.synchronize()
        return copied

    def hand_over(self, batch: StepBatch) -> None:
        """Keeps the allocator from reusing the batch's memory before this stream is done."""
        current = torch.cuda.current_stream(self.device)
        for stream in batch.streams.values():
            for tensor in stream.on_device:
                tensor.record_stream(current)


def prefetch_to_device(
    batches: Iterator[StepBatch], *, device: torch.device
) -> Iterator[StepBatch]:
    """Copies batches to a device; a GPU holds at most the one in use and the next.

    Args:
        batches: batches, each valid until the next is asked for; pinned if the device is a GPU.
        device: target of the copies.
    """
    if device.type == "cuda":
        return prefetch_with(CudaCopier(device), batches)
    return batches


def prefetch_with(copier: BatchCopier, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """Yields the batches, which a thread copies while the batch before is in use."""
    copied: queue.SimpleQueue[StepBatch | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(1)

    def copy_all() -> None:
        try:
            while room.acquire() and (batch := next(batches, None)) is not None:
                copied.put(copier.copy(batch))
            copied.put(None)
        except BaseException as error:
            copied.put(error)

    threading.Thread(target=copy_all, name="device-prefetch", daemon=True).start()
    while (batch := copied.get()) is not None:
        if isinstance(batch, BaseException):
            raise batch
        copier.hand_over(batch)
        room.release()
        yield batch
