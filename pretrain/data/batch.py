"""A rank's share of one step, on its way from the loader to the model, and the memory it is in."""

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

DEVICE_TENSORS = ("media", "stripes", "tokens", "media_keys", "caption_keys")
ALIGNMENT = 64  # bytes; of every tensor in a shared buffer


@dataclass(frozen=True)
class PairingBatch:
    """A rank's pairs of one pairing in one step; B is 0 where the step does not take the pairing.

    What two rows have in common is in `media_keys` and `caption_keys`: equal keys, equal content.
    """

    media: Tensor  # uint8 [B, 3, H, Wd], channels last, or float32 [B, samples]
    stripes: Tensor  # int32 [B, stripes, 2] start and width of SpecAugment's stripes
    tokens: Tensor  # int64 [B, L]
    caption_lengths: Tensor  # int64 [B] tokens up to the last that is not padding; on the CPU
    media_keys: Tensor  # int64 [B] of the sample whose media this is
    caption_keys: Tensor  # int64 [B] of the tokens
    first_slot: int  # in the global batch, of the first row; the others follow one after another
    digest: np.ndarray  # int64 [2], see sample_order.digest_halves
    bad_samples: list[BadSample] = field(default_factory=list)
    # (source, epoch) -> slots of that epoch that were filled, also by substitutes
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)

    @property
    def on_device(self) -> list[Tensor]:
        """What the model's device computes with."""
        return [getattr(self, name) for name in DEVICE_TENSORS]

    def to(self, device: torch.device) -> PairingBatch:
        """On the device that encodes it, without waiting for the copy."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in DEVICE_TENSORS}
        # The loader fills the memory of what stays here again when the copies are made.
        return replace(self, **moved, caption_lengths=self.caption_lengths.clone())

    def pin_memory(self) -> PairingBatch:
        """In memory that a GPU copies from by itself (called by torch's DataLoader)."""
        pinned = {
            name: value.pin_memory()
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **pinned)


@dataclass(frozen=True)
class StepBatch:
    """A rank's share of one step."""

    step: int
    pairings: dict[PairingName, PairingBatch]
    taken: list[PairingName]  # pairings whose loss is part of the step; the others have no rows

    def to(self, device: torch.device) -> StepBatch:
        """On the device that encodes it, without waiting for the copy."""
        return replace(self, pairings={n: pairs.to(device) for n, pairs in self.pairings.items()})

    def pin_memory(self) -> StepBatch:
        """As PairingBatch.pin_memory."""
        return replace(self, pairings={n: p.pin_memory() for n, p in self.pairings.items()})


# -------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class PairLayout:
    """Shapes of a pairing's rows."""

    media_shape: tuple[int, ...]  # (H, Wd, 3) or (samples,)
    media_dtype: torch.dtype
    num_stripes: int
    context_length: int  # tokens

    def tensors(self, num_rows: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Name -> (shape, type) of everything that is kept for that many rows."""
        return {
            "media": ((num_rows, *self.media_shape), self.media_dtype),
            "stripes": ((num_rows, self.num_stripes, 2), torch.int32),
            "tokens": ((num_rows, self.context_length), torch.int64),
            "caption_lengths": ((num_rows,), torch.int64),
            "media_keys": ((num_rows,), torch.int64),
            "caption_keys": ((num_rows,), torch.int64),
        }

    def num_bytes(self, num_rows: int) -> int:
        """Bytes that `PairBuffers.within` needs."""
        return sum(
            _aligned(math.prod(shape) * dtype.itemsize)
            for shape, dtype in self.tensors(num_rows).values()
        )


@dataclass(frozen=True)
class PairBuffers:
    """Rows of one pairing that loaders fill, each row by one thread."""

    media: Tensor  # [B, *media_shape]
    stripes: Tensor  # int32 [B, stripes, 2]
    tokens: Tensor  # int64 [B, L]
    caption_lengths: Tensor  # int64 [B]
    media_keys: Tensor  # int64 [B]
    caption_keys: Tensor  # int64 [B]

    @classmethod
    def new(cls, layout: PairLayout, *, num_rows: int) -> PairBuffers:
        """In memory of its own."""
        shapes = layout.tensors(num_rows).items()
        return cls(**{name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes})

    @classmethod
    def within(cls, memory: Tensor, layout: PairLayout, *, num_rows: int) -> PairBuffers:
        """In the first bytes of `memory`, uint8 [bytes]."""
        views, start = {}, 0
        for name, (shape, dtype) in layout.tensors(num_rows).items():
            num_bytes = math.prod(shape) * dtype.itemsize
            views[name] = memory[start : start + num_bytes].view(dtype).view(shape)
            start += _aligned(num_bytes)
        return cls(**views)

    def __len__(self) -> int:
        return len(self.media)

    def first(self, num_rows: int) -> PairBuffers:
        """The first rows alone."""
        return PairBuffers(**{name: value[:num_rows] for name, value in vars(self).items()})

    def to_batch(
        self,
        *,
        first_slot: int,
        digest: np.ndarray,
        bad_samples: list[BadSample],
        num_read: Counter[tuple[str, int]],
    ) -> PairingBatch:
        """The batch whose tensors are views of this memory."""
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
    """Bytes of a step's buffers, with (layout, rows) of each pairing."""
    return sum(layout.num_bytes(num_rows) for layout, num_rows in layouts.values())


def step_buffers(
    memory: Tensor, layouts: Mapping[PairingName, tuple[PairLayout, int]]
) -> dict[PairingName, PairBuffers]:
    """Buffers of every pairing, one after the other in `memory`, uint8 [step_bytes]."""
    buffers, start = {}, 0
    for name, (layout, num_rows) in layouts.items():
        buffers[name] = PairBuffers.within(memory[start:], layout, num_rows=num_rows)
        start += layout.num_bytes(num_rows)
    return buffers


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
