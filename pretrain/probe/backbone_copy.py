"""Copies of a tower's backbone, and calls of it whose errors name the layer."""

from __future__ import annotations

import copy
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.captioning.tower_tokens import pooled
from pretrain.model.library_errors import describe_library_error
from pretrain.model.sample_dropout import TowerDropKeys, scramble
from pretrain.probe.float64 import ComputeInFloat64

# Parameters below this magnitude (LayerScale, residuals initialised to zero) mask the layers
# before them.
ALMOST_ZERO = 1e-3


class NotCopiedError(Exception):
    """A backbone that cannot be copied."""


@dataclass(frozen=True)
class ProbedBackbone:
    """A backbone to probe, or a copy of one.

    Attributes:
        backbone: the backbone.
        drop_keys: keys of its dropout layers.
        where: name of the tower for messages.
        is_trained: whether it runs in training mode and its parameters get gradients.
    """

    backbone: nn.Module
    drop_keys: TowerDropKeys
    where: str
    is_trained: bool

    @property
    def mode(self) -> str:
        """Mode in which the run uses the backbone, for messages."""
        return f"in {'training' if self.is_trained else 'evaluation'} mode"

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; the CPU if there is none."""
        return next((each.device for each in self.backbone.parameters()), torch.device("cpu"))

    @property
    def num_parameters(self) -> int:
        """Number of parameters."""
        return sum(each.numel() for each in self.backbone.parameters())

    def copy(
        self, *, device: torch.device, dtype: torch.dtype, fills_zeros: bool = False
    ) -> ProbedBackbone:
        """Copies the backbone, in the mode in which the run uses it.

        All parameters of a trained backbone require gradients in the copy. Parameters that
        `probe_backbone` froze as unused thus show whether other inputs use them.

        Args:
            device: device of the copy.
            dtype: type of its floating-point values.
            fills_zeros: whether parameters that are almost zero get random values.

        Raises:
            NotCopiedError: if the backbone cannot be copied.
        """
        generator = torch.Generator().manual_seed(0)
        memo: dict[int, Any] = {}
        for tensor in [*self.backbone.parameters(), *self.backbone.buffers()]:
            values = tensor.detach()
            is_parameter = isinstance(tensor, nn.Parameter)
            if fills_zeros and is_parameter and _is_almost_zero(values):
                values = 0.02 * torch.randn(values.shape, generator=generator)
            values = values.to(device, _type_like(values, dtype), copy=True)
            if is_parameter:
                values = nn.Parameter(values, requires_grad=self.is_trained)
            memo[id(tensor)] = values
        try:
            backbone, drop_keys = copy.deepcopy((self.backbone, self.drop_keys), memo)
        except Exception as error:  # layers may store what cannot be copied
            raise NotCopiedError(
                f"{type(self.backbone).__name__} cannot be copied: {describe_library_error(error)}"
            ) from error
        return ProbedBackbone(
            backbone.train(self.is_trained), drop_keys, self.where, self.is_trained
        )

    def encode(self, examples: Tensor, *, first: int = 0, how: str) -> Tensor:
        """Encodes [B, ...] to features [B, W]; a copy in float64 computes in float64 throughout.

        Args:
            examples: input of the backbone, of its device and type.
            first: number of the first example, which determines its dropout.
            how: description of the call for the error message.

        Raises:
            InputError: if the backbone cannot encode the input.
        """
        try:
            return self._call(examples, first)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # libraries raise errors of any type
            raise InputError(
                f"{self.where}: {self._failing_layer(examples, first)} cannot encode input "
                f"{list(examples.shape)} {how}: {describe_library_error(error)}"
            ) from error

    def _call(self, examples: Tensor, first: int) -> Tensor:
        keys = scramble(torch.arange(first, first + len(examples), device=examples.device))
        is_float64 = any(p.dtype == torch.float64 for p in self.backbone.parameters())
        precision = ComputeInFloat64() if is_float64 else nullcontext()
        with precision, self.drop_keys.set_pairs(keys if self.is_trained else None):
            # Some backbones change their input in place.
            return pooled(self.backbone, self.backbone(examples.clone()))

    def _failing_layer(self, examples: Tensor, first: int) -> str:
        """Name of the innermost layer that raises an error."""
        running: list[str] = []

        def remove_last(layer: nn.Module, args: Any, output: Any) -> None:
            running.pop()

        hooks = [
            hook
            for name, layer in self.backbone.named_modules()
            for hook in (
                layer.register_forward_pre_hook(lambda *_, name=name: running.append(name)),
                layer.register_forward_hook(remove_last),
            )
        ]
        with suppress(Exception):  # the error is known
            self._call(examples, first)
        for hook in hooks:
            hook.remove()
        return f"layer {running[-1]}" if running and running[-1] else "the backbone"

    def layer_name(self, layer: nn.Module) -> str:
        """Describes a layer of the backbone by name and class."""
        names = {id(module): name for name, module in self.backbone.named_modules()}
        return f"layer {names[id(layer)] or '(the backbone)'} ({type(layer).__name__})"


def _is_almost_zero(values: Tensor) -> bool:
    return values.numel() > 0 and bool(values.abs().max() < ALMOST_ZERO)


def _type_like(values: Tensor, dtype: torch.dtype) -> torch.dtype:
    if values.is_complex():
        return torch.complex128 if dtype == torch.float64 else torch.complex64
    return dtype if values.is_floating_point() else values.dtype
