"""The factor of the loss in bf16, so that a backward pass rounds alike on any number of ranks.

The loss of a rank is multiplied by the number of ranks, because the engine averages gradients.
A factor that is no power of two changes all roundings of the backward pass. On three ranks, the
gradient of a step was twice as far from that of one rank. Therefore the loss is scaled further, to
a power of two. The gradients of parameters, in float32, are divided by the same factor before they
are averaged.
"""

from __future__ import annotations

import torch

from pretrain.config import Precision


def backward_scale(precision: Precision, *, num_processes: int) -> float:
    """Returns the factor of the loss, in [1, 2); 1 in fp32, whose rounding is much finer.

    Args:
        precision: precision of the towers.
        num_processes: number of processes.
    """
    if precision == "fp32":
        return 1.0
    return 2 ** (num_processes - 1).bit_length() / num_processes


def divide_gradients(model: torch.nn.Module, scale: float) -> None:
    """Divides the gradient of every trained parameter before it is accumulated.

    Args:
        model: model in training.
        scale: result of `backward_scale`.
    """
    if scale != 1:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(lambda gradient: gradient / scale)
