"""Comparison of two ways of encoding a sample: features, gradients, buffers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.errors import InputError
from pretrain.model.library_errors import describe_library_error
from pretrain.probe.backbone_copy import ProbedBackbone
from pretrain.probe.mixing_layer import relative_difference


@dataclass(frozen=True)
class Call:
    """A call of a backbone.

    Attributes:
        examples: inputs [B, ...].
        first: number of the first one, which determines its dropout.
        row: row of the sample whose features and gradients are compared.
    """

    examples: Tensor
    first: int
    row: int


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences caused by rounding.

    Attributes:
        largest: relative to the largest magnitude of features, or of a parameter's gradient.
        floor: fraction of the largest gradient of all parameters. Smaller gradients are compared
            relative to it, because they may consist of rounding errors only.
    """

    largest: float
    floor: float


@dataclass(frozen=True)
class Differences:
    """Differences between two ways of encoding a sample.

    Attributes:
        features: relative difference of the features.
        gradient: largest relative difference of a parameter's gradient.
        parameter: name of that parameter.
        buffer: name of a buffer that encoding changed; None if there is none.
        routed: name of a parameter that only one of the ways uses; None if there is none.
    """

    features: float
    gradient: float
    parameter: str
    buffer: str | None
    routed: str | None

    def exceed(self, tolerance: Tolerance) -> bool:
        """Returns whether features or gradients differ by more than rounding."""
        return max(self.features, self.gradient) > tolerance.largest


def compare(
    copied: ProbedBackbone,
    one: Call,
    other: Call,
    *,
    floor: float,
    how: str,
    between: Callable[[], None] = lambda: None,
) -> Differences:
    """Encodes the same sample in two ways and compares features and gradients.

    The gradients of the second way are subtracted from those of the first in place, which stores
    only one gradient of each parameter.

    Args:
        copied: copy of a backbone; its gradients are overwritten.
        one: first way.
        other: second way.
        floor: see Tolerance.
        how: description of the calls for error messages.
        between: called after the first way.

    Raises:
        InputError: if a call fails, or gives features or gradients that are not finite.
    """
    parameters = dict(copied.backbone.named_parameters())
    copied.backbone.zero_grad()
    features = encode(copied, one, how=how)
    scales = {name: _largest(p.grad) for name, p in parameters.items() if p.grad is not None}
    buffers = {name: values.clone() for name, values in copied.backbone.named_buffers()}
    between()
    others = encode(copied, other, how=how, sign=-1)
    lowest = max(floor * max(scales.values(), default=0.0), 1e-300)
    residuals = {
        name: _largest(p.grad) / max(scales.get(name, 0.0), lowest)
        for name, p in parameters.items()
        if p.grad is not None
    }
    worst = max(residuals, key=residuals.get, default="")
    return Differences(
        features=relative_difference(others, features),
        gradient=residuals.get(worst, 0.0),
        parameter=worst,
        buffer=_changed_buffer(copied, buffers),
        routed=next((name for name in residuals if name not in scales), None),
    )


def encode(copied: ProbedBackbone, call: Call, *, how: str, sign: int = 1) -> Tensor:
    """Returns a sample's features [W] and accumulates the gradient of their random projection.

    Args:
        copied: copy of a backbone.
        call: inputs of the backbone.
        how: description of the call for error messages.
        sign: factor of the gradient, 1 or -1.

    Raises:
        InputError: if the call fails, or gives features or gradients that are not finite.
    """
    with torch.set_grad_enabled(copied.is_trained):
        features = copied.encode(call.examples, first=call.first, how=how)
    if not features.isfinite().all():
        raise InputError(f"{copied.where}: the backbone's features are not finite {how}")
    if copied.is_trained:
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(features.shape[1], generator=generator).to(features)
        _backward(copied, sign * (features[call.row] * weights).sum(), how=how)
    return features[call.row].detach()


def _backward(copied: ProbedBackbone, loss: Tensor, *, how: str) -> None:
    try:
        loss.backward()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries raise errors of any type
        raise InputError(
            f"{copied.where}: the backbone's backward pass fails {how}: "
            f"{describe_library_error(error)}"
        ) from error
    for name, parameter in copied.backbone.named_parameters():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise InputError(f"{copied.where}: the gradient of {name} is not finite {how}")


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() > 0 else 0.0


def _changed_buffer(copied: ProbedBackbone, before: Mapping[str, Tensor]) -> str | None:
    for name, values in copied.backbone.named_buffers():
        expected = before.get(name, values)
        is_same = torch.equal(expected.nan_to_num(), values.nan_to_num())
        if expected.shape == values.shape and not is_same:
            return name
    return None
