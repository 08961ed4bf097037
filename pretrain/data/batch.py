"""Batches of one step on one rank, and the memory that loaders fill."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from pretrain.settings.data import StreamName
from pretrain.settings.views import is_of_teacher

ON_CPU = ("lengths", "present")  # tensors that stay on the CPU
ALIGNMENT = 64  # bytes, of every tensor in a shared buffer
Shape = tuple[int, ...]


@dataclass(frozen=True)
class BadSample:
    """One substitution."""

    source: str
    epoch: int
    ordinal: int
    shard: str
    substitute: int  # ordinal of the sample that was read instead
    reason: str
    is_shard_bad: bool = False  # the whole shard is missing or damaged


@dataclass(frozen=True)
class ViewBatch:
    """One view of a rank's samples: images, clips, texts or vectors.

    Rows with equal `keys` have equal contents.
    """

    # uint8 [B, 3, H, Wd], channels last; float32 [B, samples]; int64 [B, L], tokens; or float32
    # [B, width] or [B, time, width], vectors
    values: Tensor
    keys: Tensor  # int64 [B], of the sample that is shown, or of its tokens
    # int32 [B, masks, 2] (start, width) in SpecAugment, frequency masks first; clips only
    masks: Tensor | None = None
    # int64 [B] tokens up to the last that is not padding; texts of the tower `text` only; stays on
    # the CPU
    lengths: Tensor | None = None
    # int64 [B] rows up to the padding; vectors of shape [time, width] only
    num_rows: Tensor | None = None
    # bool [B] whether the sample has the modality; stays on the CPU; None: all samples have it
    present: Tensor | None = None

    def __len__(self) -> int:
        return len(self.values)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Tensors for the tower."""
        inputs = (self.values, self.masks, self.num_rows)
        return tuple(each for each in inputs if each is not None)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class StreamBatch:
    """A rank's samples of one stream in one step; B is 0 if the step does not take the stream."""

    views: dict[str, ViewBatch]
    first_slot: int  # slot of the first row in the global batch; other rows follow without a gap
    digest: np.ndarray  # int64 [2], see pretrain.sampling.order.digest_halves
    bad_samples: list[BadSample] = field(default_factory=list)
    # (source, epoch) -> rows that show this epoch, substitutes included
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(next(iter(self.views.values())))

    @property
    def without_teachers(self) -> StreamBatch:
        """The batch without the views that only teachers read."""
        views = {view: each for view, each in self.views.items() if not is_of_teacher(view)}
        return replace(self, views=views)

    @property
    def on_device(self) -> list[Tensor]:
        """Tensors that the model's device needs."""
        return [
            tensor
            for view in self.views.values()
            for name, tensor in view.tensors.items()
            if name not in ON_CPU
        ]

    def to(self, device: torch.device) -> StreamBatch:
        """Copies the batch to a device without waiting for the copy."""

        def move(name: str, tensor: Tensor) -> Tensor:
            # The loader reuses its memory after the copies, also that of tensors that stay here.
            return tensor.clone() if name in ON_CPU else tensor.to(device, non_blocking=True)

        views = {
            view: ViewBatch(**{name: move(name, tensor) for name, tensor in each.tensors.items()})
            for view, each in self.views.items()
        }
        return replace(self, views=views)

    def pin_memory(self) -> StreamBatch:
        """Copies the batch to pinned memory, which a GPU copies from by itself."""
        views = {
            view: ViewBatch(**{name: tensor.pin_memory() for name, tensor in each.tensors.items()})
            for view, each in self.views.items()
        }
        return replace(self, views=views)


@dataclass(frozen=True)
class StepBatch:
    """One rank's batches of one step."""

    step: int
    streams: dict[StreamName, StreamBatch]
    taken: list[StreamName]  # streams whose losses are part of the step; the others have no rows

    def to(self, device: torch.device) -> StepBatch:
        """Copies the batches to a device without waiting for the copy."""
        return replace(self, streams={n: each.to(device) for n, each in self.streams.items()})

    def pin_memory(self) -> StepBatch:
        """Copies the batches to pinned memory, which a GPU copies from by itself."""
        return replace(self, streams={n: each.pin_memory() for n, each in self.streams.items()})


# -------------------------------------------------------------------------------------- memory


@dataclass(frozen=True)
class ViewLayout:
    """Shape and type of a view's rows."""

    shape: Shape  # (H, Wd, 3), (samples,), (tokens,), (width,) or (time, width)
    dtype: torch.dtype
    num_masks: int = 0
    has_lengths: bool = False
    has_num_rows: bool = False
    may_lack: bool = False  # whether samples may lack the modality

    def no_rows(self) -> tuple[Tensor, ...]:
        """Returns the inputs of a tower for no sample, without the masks of training."""
        buffers = StreamBuffers.new(StreamLayout({"": replace(self, num_masks=0)}), num_rows=0)
        batch = buffers.to_batch(
            first_slot=0, digest=np.zeros(2, np.int64), bad_samples=[], num_read=Counter()
        )
        return batch.views[""].inputs

    def tensors(self, num_rows: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """Returns name -> (shape, type) of all tensors of some rows."""
        found = {
            "values": ((num_rows, *self.shape), self.dtype),
            "keys": ((num_rows,), torch.int64),
        }
        if self.num_masks:
            found["masks"] = ((num_rows, self.num_masks, 2), torch.int32)
        if self.has_lengths:
            found["lengths"] = ((num_rows,), torch.int64)
        if self.has_num_rows:
            found["num_rows"] = ((num_rows,), torch.int64)
        if self.may_lack:
            found["present"] = ((num_rows,), torch.bool)
        return found


@dataclass(frozen=True)
class StreamLayout:
    """Layout of the rows of every view of a stream."""

    views: Mapping[str, ViewLayout]

    def num_bytes(self, num_rows: int) -> int:
        """Returns the bytes that `StreamBuffers.within` needs."""
        return sum(
            _aligned(math.prod(shape) * dtype.itemsize)
            for view in self.views.values()
            for shape, dtype in view.tensors(num_rows).values()
        )


@dataclass(frozen=True)
class StreamBuffers:
    """Memory for rows of one stream, each filled by one thread; channels of images are last."""

    views: Mapping[str, ViewBatch]

    @classmethod
    def new(cls, layout: StreamLayout, *, num_rows: int) -> StreamBuffers:
        """Allocates buffers."""
        memory = torch.empty(layout.num_bytes(num_rows), dtype=torch.uint8)
        return cls.within(memory, layout, num_rows=num_rows)

    @classmethod
    def within(cls, memory: Tensor, layout: StreamLayout, *, num_rows: int) -> StreamBuffers:
        """Places buffers in the first bytes of `memory`, uint8 [bytes]."""
        views, start = {}, 0
        for view, each in layout.views.items():
            tensors = {}
            for name, (shape, dtype) in each.tensors(num_rows).items():
                num_bytes = math.prod(shape) * dtype.itemsize
                tensors[name] = memory[start : start + num_bytes].view(dtype).view(shape)
                start += _aligned(num_bytes)
            views[view] = ViewBatch(**tensors)
        return cls(views)

    def __len__(self) -> int:
        return len(next(iter(self.views.values())))

    def first(self, num_rows: int) -> StreamBuffers:
        """Returns buffers of the first rows, in the same memory."""
        return StreamBuffers(
            {
                view: ViewBatch(**{name: t[:num_rows] for name, t in each.tensors.items()})
                for view, each in self.views.items()
            }
        )

    def to_batch(
        self,
        *,
        first_slot: int,
        digest: np.ndarray,
        bad_samples: list[BadSample],
        num_read: Counter[tuple[str, int]],
    ) -> StreamBatch:
        """Returns the batch whose tensors are views of this memory."""
        views = {
            view: replace(each, values=each.values.movedim(-1, 1))  # -> [B, 3, H, Wd]
            if each.values.ndim == 4
            else each
            for view, each in self.views.items()
        }
        return StreamBatch(
            views,
            first_slot=first_slot,
            digest=digest,
            bad_samples=bad_samples,
            num_read=num_read,
        )


Layouts = Mapping[StreamName, tuple[StreamLayout, int]]  # with the largest number of rows


def step_bytes(layouts: Layouts) -> int:
    """Returns the bytes of a step's buffers."""
    return sum(layout.num_bytes(num_rows) for layout, num_rows in layouts.values())


def step_buffers(memory: Tensor, layouts: Layouts) -> dict[StreamName, StreamBuffers]:
    """Places the buffers of all streams one after another in `memory`, uint8 [step_bytes]."""
    buffers, start = {}, 0
    for name, (layout, num_rows) in layouts.items():
        buffers[name] = StreamBuffers.within(memory[start:], layout, num_rows=num_rows)
        start += layout.num_bytes(num_rows)
    return buffers


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
