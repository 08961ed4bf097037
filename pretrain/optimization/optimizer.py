"""Optimizers of the table in pretrain.settings.optimizers, as a run steps and stores them.

To a library's optimizer, a run adds bounds of logit scales, an average of the weights (EMA), and
access to its state: tensors that checkpoints store in slices, and numbers that a parameter group
shares.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.optimization.parameter_groups import parameter_groups
from pretrain.optimization.parameter_traits import Traits
from pretrain.optimization.unfreezing import MISSED_UPDATES, only_open_groups
from pretrain.settings.optimizer import Ema, Optimizer
from pretrain.settings.optimizers import EMA, OptimizerRow

COUNT = "step"  # key of the number of updates in the state of a parameter or a group
SCALARS = "scalars"  # key of the other numbers of the state in a group
WARMUP_POWER = 2 / 3  # of the decay; default of timm's ModelEmaV3


class RunOptimizer(torch.optim.Optimizer):
    """Base class in front of a library's optimizer; see `build_optimizer`.

    Everything that changes parameters is part of the step, because ZeRO updates its own copies of
    the parameters and would overwrite other changes. ZeRO calls `step` several times per update,
    each time with a part of the parameters.

    Attributes:
        row: row of the table.
        library: class of the library.
        ema: config section `optimizer.ema`.
        num_updates: updates applied so far; the engine sets it before a step.
    """

    row: OptimizerRow
    library: type[torch.optim.Optimizer]

    def __init__(
        self,
        parameters: Iterable[Any],
        *,
        arguments: Mapping[str, Any],
        ema: Ema | None = None,
    ) -> None:
        super().__init__(parameters, **arguments)
        self.ema = ema
        self.num_updates = 0
        self._arguments = arguments
        self._averages: dict[Tensor, Tensor] = {}  # parameter -> average
        self._unstepped: set[Tensor] = set()  # parameters whose state no step has used

    @torch.no_grad()
    @only_open_groups
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        for group in self.param_groups:
            self._prepare(group)
        loss = super().step(closure)
        for group in self.param_groups:
            if group.get("clamp") is not None:
                for parameter in group["params"]:
                    parameter.clamp_(*group["clamp"])
            self._finish(group)
        return loss

    def _prepare(self, group: dict[str, Any]) -> None:
        if self.row.group_count is not None:
            count = self.num_updates - group.get(MISSED_UPDATES, 0)
            group[COUNT] = torch.tensor(float(count)) if self.row.group_count == "tensor" else count
        self._restore_scalars(group)
        for parameter in _with_gradient(group):
            if parameter in self._unstepped:
                # Some optimizers take another first step, which they know by the missing state.
                self._unstepped.discard(parameter)
                del self.state[parameter]
            if self.ema is not None:
                self._average_of(parameter)

    def _restore_scalars(self, group: dict[str, Any]) -> None:
        """Sets the numbers of the group before this update; a part of it may have been stepped."""
        if not self.row.scalars:
            return
        if group.get("scalars_of_update") != self.num_updates:
            group["scalars_of_update"] = self.num_updates
            group["scalars_before"] = group.get(SCALARS, {})
        before = group["scalars_before"]
        for parameter in _with_gradient(group) if before else ():
            state = self.state[parameter]
            if not state:  # padding of ZeRO alone, which no checkpoint holds
                state |= self._initial_state(parameter)
            state |= {name: _as(state[name], value) for name, value in before.items()}

    def _finish(self, group: dict[str, Any]) -> None:
        parameters = _with_gradient(group)
        if not parameters:
            return
        if self.row.scalars:
            state = self.state[parameters[0]]
            group[SCALARS] = {name: float(state[name]) for name in self.row.scalars}
        if self.ema is not None:
            weight = 1 - ema_decay(self.ema, update=self.num_updates + 1)
            averages = [self._averages[parameter] for parameter in parameters]
            torch._foreach_lerp_(averages, parameters, weight)

    # ----------------------------------------------------------------------------------- state

    def tensors_of(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns {key: tensor} of a trained parameter's state, which checkpoints store.

        Before the first step, moments are zero and the average is the parameter itself.
        """
        state = self.state[parameter]
        if not state:
            state |= self._initial_state(parameter)
            self._unstepped.add(parameter)
        others = (COUNT, *self.row.scalars)
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor) and k not in others}
        return tensors if self.ema is None else tensors | {EMA: self._average_of(parameter)}

    def _average_of(self, parameter: Tensor) -> Tensor:
        if parameter not in self._averages:
            self._averages[parameter] = parameter.detach().clone()
        return self._averages[parameter]

    def _initial_state(self, parameter: Tensor) -> dict[str, Any]:
        """The library's state of a parameter with zero for all numbers, learned from a step."""
        is_whole = self.row.needs_whole is not None
        probe = torch.zeros_like(parameter) if is_whole else parameter.new_zeros(1)
        probe = probe.detach()
        probe.grad = torch.zeros_like(probe)
        optimizer = self.library([probe], **self._arguments)
        optimizer.step()
        return {
            key: torch.zeros_like(parameter)
            if isinstance(value, Tensor) and value.shape == probe.shape
            else _as(value, 0)
            for key, value in optimizer.state[probe].items()
        }

    @property
    def scalars(self) -> list[dict[str, float]]:
        """Numbers of the state that do not follow from the number of updates, by group."""
        return [dict(group.get(SCALARS, {})) for group in self.param_groups]

    def set_scalars(self, scalars: Sequence[Mapping[str, float]]) -> None:
        """Sets the numbers of the state, by group, to those of another optimizer."""
        for group, values in zip(self.param_groups, scalars, strict=True):
            group[SCALARS] = dict(values)

    def set_updates(self, parameter: Tensor, num_updates: int) -> None:
        """Sets the number of updates that a parameter has had, after writing to its tensors."""
        self.tensors_of(parameter)  # creates them if needed
        state = self.state[parameter]
        if COUNT in state:
            state[COUNT] = _as(state[COUNT], num_updates)
        if num_updates:
            self._unstepped.discard(parameter)
        else:
            self._unstepped.add(parameter)


def _with_gradient(group: Mapping[str, Any]) -> list[Tensor]:
    return [parameter for parameter in group["params"] if parameter.grad is not None]


def _as(example: Any, value: float) -> Any:
    """The value as a tensor like the example, or in its type; a flag of an optimizer is kept."""
    if isinstance(example, Tensor):
        return torch.full_like(example, value)
    return example if isinstance(example, bool) else type(example)(value)


def ema_decay(config: Ema, *, update: int) -> float:
    """Returns the decay of an update of the average.

    Args:
        config: config section `optimizer.ema`.
        update: number of the update, from 1.
    """
    return min(config.decay, 1 - update**-WARMUP_POWER) if config.warmup else config.decay


def new_optimizer(config: Optimizer, parameters: Iterable[Any]) -> RunOptimizer:
    """Builds an optimizer of parameters or groups; its learning rate is set before each step.

    Args:
        config: config section `optimizer`.
        parameters: tensors, or groups with `params`, `weight_decay` and the bounds `clamp`.
    """
    module, _, name = config.row.path.rpartition(".")
    library = getattr(import_module(module), name)
    members = {"row": config.row, "library": library}
    arguments = {"lr": 0.0} | config.arguments()
    return type(name, (RunOptimizer, library), members)(
        parameters, arguments=arguments, ema=config.ema
    )


def build_optimizer(
    config: Optimizer,
    model: nn.Module,
    *,
    max_scale: float,
    traits: Mapping[str, Traits] | None = None,
) -> RunOptimizer:
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
    return new_optimizer(config, groups)


def state_sizes(config: Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, int]]:
    """Returns {key: elements} of the tensors that the optimizer keeps of each parameter.

    Args:
        config: config section `optimizer`.
        parameters: trained parameters; only their shapes are read.
    """
    optimizer = new_optimizer(config, [torch.zeros(1)])
    if config.row.needs_whole is None:
        keys = optimizer.tensors_of(torch.zeros(1)).keys()
        return [dict.fromkeys(keys, parameter.numel()) for parameter in parameters]
    known: dict[torch.Size, dict[str, int]] = {}
    for shape in {parameter.shape for parameter in parameters}:
        tensors = optimizer.tensors_of(torch.zeros(shape))
        known[shape] = {key: each.numel() for key, each in tensors.items()}
    return [known[parameter.shape] for parameter in parameters]


def num_state_values(config: Optimizer, parameters: Iterable[Tensor]) -> int:
    """Counts the elements of all tensors of `state_sizes`."""
    return sum(sum(sizes.values()) for sizes in state_sizes(config, list(parameters)))
