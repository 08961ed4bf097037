"""Search for the first layer of a backbone that mixes samples."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# Values that enter and leave a layer in one call.
Call = tuple[list[Tensor], list[Tensor]]


@torch.no_grad()
def first_layer_that_mixes(
    backbone: nn.Module,
    encode_alone: Callable[[], Any],
    encode_together: Callable[[], Any],
    *,
    row: int,
    tolerance: float,
) -> nn.Module | None:
    """Finds the innermost layer whose inputs are equal and whose outputs differ.

    Args:
        backbone: backbone that the two functions call.
        encode_alone: encodes one sample.
        encode_together: encodes several samples.
        row: number of the one sample among them.
        tolerance: relative difference above which values differ.
    """
    alone: dict[nn.Module, list[Call]] = {}
    found: list[nn.Module] = []

    def compare(layer: nn.Module, together: Call) -> None:
        if found or not alone.get(layer):
            return
        inputs, outputs = (
            all(
                holds_sample(one, several, row=row, tolerance=tolerance)
                for one, several in zip(*sides, strict=False)
            )
            for sides in zip(alone[layer].pop(0), together, strict=True)
        )
        if inputs and not outputs:
            found.append(layer)

    with _observed_calls(backbone, lambda layer, call: alone.setdefault(layer, []).append(call)):
        encode_alone()
    with _observed_calls(backbone, compare):
        encode_together()
    return found[0] if found else None


@contextmanager
def _observed_calls(
    backbone: nn.Module, observe: Callable[[nn.Module, Call], None]
) -> Iterator[None]:
    """Passes each layer and its call to `observe`, the innermost layer first."""
    inputs: list[list[Tensor]] = []

    def before(layer: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append(_tensors_in((args, kwargs)))

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        observe(layer, (inputs.pop(), _tensors_in(output)))

    hooks = [
        hook
        for layer in backbone.modules()
        for hook in (
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        )
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors_in(values: Any) -> list[Tensor]:
    tensors = [each for each in tree_leaves(values) if isinstance(each, Tensor)]
    return [each.clone() for each in tensors if each.is_floating_point()]


def holds_sample(one: Tensor, several: Tensor, *, row: int, tolerance: float) -> bool:
    """Returns whether values of several samples contain those of one.

    The samples may be on any axis, adjacent or interleaved. Values of other shapes cannot be
    compared and count as equal.

    Args:
        one: values of the one sample.
        several: values of all samples.
        row: number of the one sample among them.
        tolerance: largest relative difference of equal values.
    """
    if one.ndim != several.ndim:
        return True
    axes = [axis for axis in range(one.ndim) if one.shape[axis] != several.shape[axis]]
    if not axes:
        return relative_difference(one, several) <= tolerance
    num_samples, rest = divmod(several.shape[axes[0]], max(1, one.shape[axes[0]]))
    if len(axes) > 1 or rest or num_samples < 2:
        return True
    length = one.shape[axes[0]]
    adjacent = several.narrow(axes[0], row * length, length)
    interleaved = several.movedim(axes[0], 0)[row::num_samples].movedim(0, axes[0])
    return any(relative_difference(one, each) <= tolerance for each in (adjacent, interleaved))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Computes the largest difference of two tensors, relative to the largest magnitude.

    Infinite values and NaN at the same positions count as equal.

    Args:
        ours: floating-point tensor.
        theirs: tensor of the same shape, which gives the magnitude.
    """
    is_finite = ours.isfinite()
    if not torch.equal(is_finite, theirs.isfinite()):
        return float("inf")
    ours, theirs = ours[is_finite], theirs[is_finite]
    if ours.numel() == 0:
        return 0.0
    largest = theirs.abs().max().clamp(min=torch.finfo(ours.dtype).tiny)
    return float((ours - theirs).abs().max() / largest)
