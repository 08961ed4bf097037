"""Copies batches to the device while the step before is computed."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pretrain.pair_batch import StepBatch


def copy_ahead(batches: Iterator[StepBatch], *, device: torch.device) -> Iterator[StepBatch]:
    """The batches on the device. On a GPU the next one is copied while this one is used.

    Args:
        batches: each holds until the next is asked for; pinned if the device is a GPU.
        device: where they go.
    """
    if device.type == "cuda":
        return _copy_on_stream(batches, torch.cuda.Stream(device), device)
    return batches


def _copy_on_stream(
    batches: Iterator[StepBatch], stream: torch.cuda.Stream, device: torch.device
) -> Iterator[StepBatch]:
    """Two batches are on the device at a time: the one in use and the next."""
    ahead = _copied(batches, stream, device)
    while ahead is not None:
        current = torch.cuda.current_stream(device)
        current.wait_stream(stream)
        for pairing in ahead.pairings.values():
            for tensor in (pairing.media, pairing.stripes, pairing.tokens):
                tensor.record_stream(current)  # its memory is not to be reused while in use here
        batch = ahead
        stream.synchronize()  # until then the loader must not fill the pinned memory again
        ahead = _copied(batches, stream, device)
        yield batch


def _copied(
    batches: Iterator[StepBatch], stream: torch.cuda.Stream, device: torch.device
) -> StepBatch | None:
    batch = next(batches, None)
    if batch is None:
        return None
    with torch.cuda.stream(stream):
        return batch.to(device)
