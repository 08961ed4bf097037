"""Parameter groups that are trained from a step on: optimizer.unfreeze.

Before that step, a group is closed:

- gradients of its parameters are zero, so the gradient norm and clipping do not count them;
- the optimizer leaves it out, so it has no moments and no decay;
- backbones and blocks in it are in evaluation mode, so they drop nothing.

All strategies hold the group from the first step on, because ZeRO flattens every group once. When
the group opens, its number of updates is 0, as if it had been added to an optimizer of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.optimization.parameter_traits import release_parts

MISSED_UPDATES = "missed_updates"  # key of a group: updates before it was opened


def only_open_groups(step: Callable[..., Any]) -> Callable[..., Any]:
    """Makes an optimizer's `step` leave out closed groups."""

    @wraps(step)
    def step_open_groups(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        groups = self.param_groups
        self.param_groups = [each for each in groups if each.get("is_open", True)]
        try:
            return step(self, *args, **kwargs)
        finally:
            self.param_groups = groups

    return step_open_groups


class Unfreezing:
    """Opens the groups of an optimizer when their step has come.

    Args:
        model: model with the parameters of the optimizer, not yet wrapped by an engine.
        optimizer: optimizer of groups from `parameter_groups`.
    """

    def __init__(self, model: ContrastiveModel, optimizer: torch.optim.Optimizer) -> None:
        self._model = model
        self._optimizer = optimizer
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._from_step: dict[str, int] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._missed: dict[int, int] = {}  # first step -> updates before it
        for group in optimizer.param_groups:
            group["is_open"] = group.get("from_step", 0) == 0
            for parameter in [] if group["is_open"] else group["params"]:
                name = names[id(parameter)]
                self._from_step[name] = group["from_step"]
                self._hooks[name] = parameter.register_hook(torch.zeros_like)

    def is_open(self, name: str) -> bool:
        """Returns whether a parameter is trained now, if it is ever trained."""
        return name not in self._hooks

    def missed_updates(self, name: str) -> int:
        """Returns the number of updates before a parameter was opened."""
        return self._missed.get(self._from_step.get(name, 0), 0)

    def open_groups(self, step: int, *, updates_before: Callable[[int], int]) -> bool:
        """Opens the groups that are trained at a step, and returns whether there were any.

        Args:
            step: number of the step, from 0.
            updates_before: function that returns the number of updates before a step.
        """
        opened = [name for name in self._hooks if self._from_step[name] <= step]
        for name in opened:
            self._hooks.pop(name).remove()
            self._missed[self._from_step[name]] = updates_before(self._from_step[name])
        for group in self._optimizer.param_groups:
            group["is_open"] = group.get("from_step", 0) <= step or group["is_open"]
            group[MISSED_UPDATES] = self._missed.get(group.get("from_step", 0), 0)
        parameters = dict(self._model.named_parameters())
        ids = {id(parameters[name]) for name in opened}
        for tower in self._model.towers.values() if opened else ():
            release_parts(tower, ids)
        return bool(opened)


def learning_rates(groups: list[dict[str, Any]]) -> dict[str, float]:
    """Returns {parameters: learning rate} of an optimizer's groups; empty if all are alike.

    Closed groups have the rate 0.
    """
    rates = {
        label: group["lr"] if group["is_open"] else 0.0
        for group in groups
        for label in group.get("labels", ())
    }
    scales = {(group.get("rate_scale", 1.0), group.get("from_step", 0)) for group in groups}
    return rates if len(scales) > 1 else {}
