"""Which code computes tiles of logits: chosen from device, type and options, never by a setting.

    library  products by the device's library, and their use in a few passes over a tile, which on a
             GPU are compiled into a kernel each (gpu_compiler): every device, type and options
    triton   the products' use inside kernels of our own: bfloat16 on a GPU, where own pairs are the
             only targets

Both give the same numbers, up to the order of sums. Triton multiplies float32 without the tensor
cores and slower than the library does; duplicates, smoothing and teachers are too rare for kernels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from pretrain.loss.gpu_compiler import runs_triton
from pretrain.loss.logit_tiles import LogitTiles
from pretrain.loss.sigmoid import SigmoidStrips
from pretrain.loss.softmax import SoftmaxStrips

Backend = Literal["library", "triton"]


@dataclass(frozen=True)
class StripClasses:
    """The parts of a backend: tiles, and the losses that use them."""

    tiles: type[Any]
    softmax: type[Any]
    sigmoid: type[Any]


def choose_backend(
    device: torch.device,
    dtype: torch.dtype,
    *,
    has_duplicates: bool = False,
    label_smoothing: float = 0.0,
    has_teacher: bool = False,
) -> Backend:
    """The fastest that computes this loss on this device.

    Args:
        has_duplicates: some pairs of this batch are set apart from the negatives.
    """
    if has_duplicates or label_smoothing or has_teacher:
        return "library"
    if dtype != torch.bfloat16 or device.type != "cuda":
        return "library"
    return "triton" if runs_triton(device) else "library"


def strip_classes(backend: Backend) -> StripClasses:
    """The parts of a backend; Triton is imported here, where it is needed."""
    if backend == "library":
        return StripClasses(LogitTiles, SoftmaxStrips, SigmoidStrips)
    from pretrain.loss.feature_tiles import FeatureTiles
    from pretrain.loss.fused import FusedSigmoidStrips, FusedSoftmaxStrips

    return StripClasses(FeatureTiles, FusedSoftmaxStrips, FusedSigmoidStrips)
