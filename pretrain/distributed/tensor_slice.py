"""Contiguous slices of flattened tensors, the unit of state in engines and checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

PARAMETER = "parameter"  # key of the slices of the model itself


@dataclass(frozen=True)
class TensorSlice:
    """A contiguous range of elements of a flattened tensor, without its values."""

    tensor: str  # "<key>/<parameter>", where key is "parameter", or a name of the optimizer
    offset: int  # index of the first element in the flattened tensor
    length: int  # elements

    @property
    def stop(self) -> int:
        """Index after the last element."""
        return self.offset + self.length

    @property
    def key(self) -> str:
        """Kind of values, such as "parameter", "exp_avg" or "ema"."""
        return self.tensor.partition("/")[0]

    @property
    def parameter(self) -> str:
        """Name of the parameter."""
        return self.tensor.partition("/")[2]


@dataclass(frozen=True)
class HeldSlice:
    """A slice that this rank holds, with its values."""

    slice: TensorSlice
    values: Tensor  # [length]; a view of the engine's memory, so that writes change the engine
    is_replicated: bool  # whether every rank holds this same slice
