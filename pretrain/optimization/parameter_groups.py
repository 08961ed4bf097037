"""Parameter groups: weight decay and bounds of every trained parameter."""

from __future__ import annotations

import math

from torch import nn


def parameter_groups(model: nn.Module, *, weight_decay: float, max_scale: float) -> list[dict]:
    """Returns groups with decay (matrices, kernels), without (norms, biases), and logit scales."""
    decayed, undecayed, scales = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.startswith("log_logit_scale."):
            scales.append(parameter)
        elif parameter.ndim < 2:
            undecayed.append(parameter)
        else:
            decayed.append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "clamp": None},
        {"params": undecayed, "weight_decay": 0.0, "clamp": None},
        {"params": scales, "weight_decay": 0.0, "clamp": (0.0, math.log(max_scale))},
    ]
    return [group for group in groups if group["params"]]
