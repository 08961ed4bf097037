"""Backends that compute logit tiles, chosen by device, dtype and loss options.

    library  The device's library multiplies matrices, and a few passes process each tile. On a GPU
             each pass is compiled into one kernel (gpu_compiler.py). Supports every device, dtype
             and option.
    triton   Kernels of this project process each tile while computing it (kernels.py). Supports
             bfloat16 on a GPU if own pairs are the only targets.

Both give the same results up to the order of summation, so no setting is needed. In float32 Triton
cannot use the tensor cores and is slower than the library. Duplicates, label smoothing, teachers
and softmaxes over all pairs are too rare to justify kernels of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from pretrain.loss.gpu_compiler import runs_triton
from pretrain.loss.logit_tiles import LogitTiles
from pretrain.loss.sigmoid import TiledSigmoidLoss
from pretrain.loss.softmax import TiledSoftmaxLoss

Backend = Literal["library", "triton"]


@dataclass(frozen=True)
class BackendClasses:
    """The classes of a backend: its tiles, and the losses that use them."""

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
    is_per_anchor: bool = True,
) -> Backend:
    """Returns the fastest backend that computes a loss on a device.

    Args:
        dtype: dtype of the features.
        has_duplicates: whether some pairs of this batch are excluded from the negatives.
        is_per_anchor: whether every row and column has its own softmax.
    """
    if has_duplicates or label_smoothing or has_teacher or not is_per_anchor:
        return "library"
    if dtype != torch.bfloat16 or device.type != "cuda":
        return "library"
    return "triton" if runs_triton(device) else "library"


def backend_classes(backend: Backend) -> BackendClasses:
    """Returns the classes of a backend; imports Triton only if it is used."""
    if backend == "library":
        return BackendClasses(LogitTiles, TiledSoftmaxLoss, TiledSigmoidLoss)
    from pretrain.loss.feature_tiles import FeatureTiles
    from pretrain.loss.fused import FusedSigmoidLoss, FusedSoftmaxLoss

    return BackendClasses(FeatureTiles, FusedSoftmaxLoss, FusedSigmoidLoss)
