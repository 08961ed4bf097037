"""AdamW with bounds for logit scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from pretrain.optimization.parameter_groups import parameter_groups
from pretrain.optimization.parameter_traits import Traits
from pretrain.optimization.unfreezing import only_open_groups
from pretrain.settings.optimizer import Optimizer


class ClampedAdamW(torch.optim.AdamW):
    """AdamW that clamps the parameters of a group to the group's `clamp` bounds.

    The clamp is part of the step, because ZeRO updates its own copies of the parameters and would
    overwrite clamped values in the model.
    """

    @torch.no_grad()
    @only_open_groups
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = super().step(closure)
        for group in self.param_groups:
            if group["clamp"] is not None:
                for parameter in group["params"]:
                    parameter.clamp_(*group["clamp"])
        return loss


def build_optimizer(
    config: Optimizer,
    model: nn.Module,
    *,
    max_scale: float,
    traits: Mapping[str, Traits] | None = None,
) -> ClampedAdamW:
    """Builds the optimizer of all trained parameters; its learning rate is set before each step.

    Args:
        config: config section `optimizer`.
        model: model to train.
        max_scale: largest logit scale.
        traits: traits of every parameter; None: those of a config without settings.
    """
    groups = parameter_groups(
        model, weight_decay=config.weight_decay, max_scale=max_scale, traits=traits
    )
    return ClampedAdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)
