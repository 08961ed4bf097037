"""AdamW with the project's parameter groups, and the learning rate of every step."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pretrain.config import Optimizer, Schedule


class ClampedAdamW(torch.optim.AdamW):
    """AdamW that clamps the parameters of a group to the group's `clamp` bounds.

    The clamp is part of the step, because ZeRO updates its own copies of the parameters and would
    overwrite clamped values in the model.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = super().step(closure)
        for group in self.param_groups:
            if group["clamp"] is not None:
                for parameter in group["params"]:
                    parameter.clamp_(*group["clamp"])
        return loss


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


def build_optimizer(config: Optimizer, model: nn.Module, *, max_scale: float) -> ClampedAdamW:
    """Builds the optimizer of all trained parameters; its learning rate is set before each step.

    Args:
        config: config section `optimizer`.
        model: model to train.
        max_scale: largest logit scale.
    """
    groups: list[dict[str, Any]] = parameter_groups(
        model, weight_decay=config.weight_decay, max_scale=max_scale
    )
    return ClampedAdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)


def learning_rate_at(step: int, *, peak: float, schedule: Schedule) -> float:
    """Returns the learning rate of a step: linear warm-up, then the schedule's shape.

    Args:
        step: number of the step, from 0.
        peak: learning rate after warm-up.
        schedule: config section `schedule`.
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    if schedule.shape == "cosine":
        steps_after_warmup = schedule.num_steps - schedule.warmup_steps
        progress = (step - schedule.warmup_steps) / steps_after_warmup
        return peak * 0.5 * (1 + math.cos(math.pi * progress))
    if schedule.shape == "constant_with_cooldown":
        return peak * min(1.0, (schedule.num_steps - step) / schedule.cooldown_steps)
    return peak
