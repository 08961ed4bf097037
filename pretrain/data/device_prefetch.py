"""Copies the next batch to the device while this one is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Protocol

import torch

from pretrain.data.batch import StepBatch


class BatchCopier(Protocol):
    """Brings batches to a device."""

    def copy(self, batch: StepBatch) -> StepBatch:
        """The batch on the device; its memory here is free again."""

    def hand_over(self, batch: StepBatch) -> None:
        """Called by the thread that computes, before it uses a copied batch."""


class CudaCopier:
    """Copies on a stream of its own, beside the computation.

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
        """Tells the allocator not to reuse the batch's memory before this stream is through."""
        current = torch.cuda.current_stream(self.device)
        for pairing in batch.pairings.values():
            for tensor in pairing.on_device:
                tensor.record_stream(current)


def copy_ahead(batches: Iterator[StepBatch], *, device: torch.device) -> Iterator[StepBatch]:
    """The batches on the device, where a GPU holds at most two: the one in use and the next.

    Args:
        batches: each holds until the next is asked for; pinned if the device is a GPU.
        device: where they go.
    """
    if device.type == "cuda":
        return copy_with(CudaCopier(device), batches)
    return batches


def copy_with(copier: BatchCopier, batches: Iterator[StepBatch]) -> Iterator[StepBatch]:
    """The batches, copied by a thread as soon as they are loaded and there is room."""
    copied: queue.SimpleQueue[StepBatch | BaseException | None] = queue.SimpleQueue()
    room = threading.Semaphore(1)

    def copy_all() -> None:
        try:
            while room.acquire() and (batch := next(batches, None)) is not None:
                copied.put(copier.copy(batch))
            copied.put(None)
        except BaseException as error:
            copied.put(error)

    threading.Thread(target=copy_all, name="copy-ahead", daemon=True).start()
    while (batch := copied.get()) is not None:
        if isinstance(batch, BaseException):
            raise batch
        copier.hand_over(batch)
        room.release()
        yield batch
