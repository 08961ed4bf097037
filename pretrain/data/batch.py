"""Batches of one step on one rank, and the memory that loaders fill."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pretrain.config import PairingName
from pretrain.data.pair_reader import BadSample

DEVICE_TENSORS = ("media", "spec_masks", "tokens", "media_keys", "caption_keys")
ALIGNMENT = 64  # bytes, of every tensor in a shared buffer


@dataclass(frozen=True)
class PairingBatch:
    """A rank's pairs of one pairing in one step; B is 0 if the step does not take the pairing.

    Rows with equal `media_keys` or `caption_keys` have equal media or captions.
    """

    media: Tensor  # uint8 [B, 3, H, Wd], channels last, or float32 [B, samples]
    spec_masks: Tensor  # int32 [B, masks, 2] (start, width) in SpecAugment, frequency masks first
    tokens: Tensor  # int64 [B, L]
    caption_lengths: Tensor  # int64 [B] tokens up to the last that is not padding; stays on the CPU
    media_keys: Tensor  # int64 [B] key of the sample that is shown
    caption_keys: Tensor  # int64 [B] key of the tokens
    first_slot: int  # slot of the first row in the global batch; other rows follow without a gap
    digest: np.ndarray  # int64 [2], see pretrain.sampling.order.digest_halves
    bad_samples: list[BadSample] = field(default_factory=list)
    # (source, epoch) -> rows that show this epoch, substitutes included
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def on_device(self) -> list[Tensor]:
        """Tensors that the model's device needs."""
        return [getattr(self, name) for name in DEVICE_TENSORS]

    def to(self, device: torch.device) -> PairingBatch:
        """Copies the batch to a device without waiting for the copy."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in DEVICE_TENSORS}
        # The loader reuses its memory after the copies, also that of tensors that stay here.
        return replace(self, **moved, caption_lengths=self.caption_lengths.clone())

    def pin_memory(self) -> PairingBatch:
        """Copies the batch to pinned memory, which a GPU copies from by itself."""
        pinned = {
            name: value.pin_memory()
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **pinned)


@dataclass(frozen=True)
class StepBatch:
    """One rank's batches of one step."""

    step: int
    pairings: dict[PairingName, PairingBatch]
    taken: list[PairingName]  # pairings whose loss is part of the step; the others have no rows

    def to(self, device: torch.device) -> StepBatch:
        """Copies the batches to a device without waiting for the copy."""
        return replace(self, pairings={n: pairs.to(device) for n, pairs in self.pairings.items()})

    def pin_memory(self) -> StepBatch:
        """Copies the batches to pinned memory, which a GPU copies from by itself."""
        return replace(self, pairings={n: p.pin_memory() for n, p in self.pairings.items()})


# -------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class PairLayout:
    """Shapes and types of a pairing's rows."""

    media_shape: tuple[int, ...]  # (H, Wd, 3) or (samples,)
    media_dtype: torch.dtype
    num_masks: int
    context_length: int  # tokens

    def tensors(self, num_rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Returns name -> (shape, type) of all tensors of some rows."""
        return {
            "media": ((num_rows, *self.media_shape), self.media_dtype),
            "spec_masks": ((num_rows, self.num_masks, 2), torch.int32),
            "tokens": ((num_rows, self.context_length), torch.int64),
            "caption_lengths": ((num_rows,), torch.int64),
            "media_keys": ((num_rows,), torch.int64),
            "caption_keys": ((num_rows,), torch.int64),
        }

    def num_bytes(self, num_rows: int) -> int:
        """Returns the bytes that `PairBuffers.within` needs."""
        return sum(
            _aligned(math.prod(shape) * dtype.itemsize)
            for shape, dtype in self.tensors(num_rows).values()
        )


@dataclass(frozen=True)
class PairBuffers:
    """Memory for rows of one pairing, each filled by one thread."""

    media: Tensor  # [B, *media_shape]
    spec_masks: Tensor  # int32 [B, masks, 2]
    tokens: Tensor  # int64 [B, L]
    caption_lengths: Tensor  # int64 [B]
    media_keys: Tensor  # int64 [B]
    caption_keys: Tensor  # int64 [B]

    @classmethod
    def new(cls, layout: PairLayout, *, num_rows: int) -> PairBuffers:
        """Allocates buffers."""
        shapes = layout.tensors(num_rows).items()
        return cls(**{name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes})

    @classmethod
    def within(cls, memory: Tensor, layout: PairLayout, *, num_rows: int) -> PairBuffers:
        """Places buffers in the first bytes of `memory`, uint8 [bytes]."""
        views, start = {}, 0
        for name, (shape, dtype) in layout.tensors(num_rows).items():
            num_bytes = math.prod(shape) * dtype.itemsize
            views[name] = memory[start : start + num_bytes].view(dtype).view(shape)
            start += _aligned(num_bytes)
        return cls(**views)

    def __len__(self) -> int:
        return len(self.media)

    def first(self, num_rows: int) -> PairBuffers:
        """Returns buffers of the first rows, in the same memory."""
        return PairBuffers(**{name: value[:num_rows] for name, value in vars(self).items()})

    def to_batch(
        self,
        *,
        first_slot: int,
        digest: np.ndarray,
        bad_samples: list[BadSample],
        num_read: Counter[tuple[str, int]],
    ) -> PairingBatch:
        """Returns the batch whose tensors are views of this memory."""
        values = vars(self)
        if self.media.ndim == 4:
            values = values | {"media": self.media.movedim(-1, 1)}  # -> [B, 3, H, Wd]
        return PairingBatch(
            **values,
            first_slot=first_slot,
            digest=digest,
            bad_samples=bad_samples,
            num_read=num_read,
        )


def step_bytes(layouts: Mapping[PairingName, tuple[PairLayout, int]]) -> int:
    """Returns the bytes of a step's buffers, with (layout, rows) of each pairing."""
    return sum(layout.num_bytes(num_rows) for layout, num_rows in layouts.values())


def step_buffers(
    memory: Tensor, layouts: Mapping[PairingName, tuple[PairLayout, int]]
) -> dict[PairingName, PairBuffers]:
    """Places the buffers of all pairings one after another in `memory`, uint8 [step_bytes]."""
    buffers, start = {}, 0
    for name, (layout, num_rows) in layouts.items():
        buffers[name] = PairBuffers.within(memory[start:], layout, num_rows=num_rows)
        start += layout.num_bytes(num_rows)
    return buffers


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
