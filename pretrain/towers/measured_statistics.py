"""Statistics of batch norm layers, measured on samples before the first step."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pretrain.towers.frozen_statistics import has_frozen_statistics


class _LastLayerError(Exception):
    """The last batch norm has its input: the layers after it need not run."""


@dataclass
class _Sums:
    """Number of values of each channel, their sum and the sum of their squares, in float64."""

    count: int = 0
    total: Tensor | float = 0.0
    squares: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        """Adds values [B, channels, ...]."""
        rows = values.transpose(0, 1).flatten(1)  # -> [channels, values]
        self.count += rows.shape[1]
        self.total = self.total + rows.sum(dim=1)
        self.squares = self.squares + rows.square().sum(dim=1)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel."""
        return self.total / self.count

    @property
    def variance(self) -> Tensor:
        """Unbiased variance of each channel, as torch keeps it."""
        biased = (self.squares / self.count - self.mean.square()).clamp(min=0)
        return biased * self.count / max(1, self.count - 1)


@torch.no_grad()
def measure_statistics(backbone: nn.Module, batches: Iterable[Tensor]) -> dict[str, Tensor]:
    """Measures the inputs of all batch norm layers with fixed statistics.

    In each batch, layers normalise with the statistics of the batch, so that later layers see
    normalised inputs. The result depends on the batches in their order, and on nothing else.

    Args:
        backbone: backbone of a tower; not changed.
        batches: inputs of the backbone.

    Returns:
        New values of the layers' buffers by name; num_batches_tracked counts samples.
    """
    copied = copy.deepcopy(backbone).double().eval()
    layers = {name: each for name, each in copied.named_modules() if has_frozen_statistics(each)}
    sums = {name: _Sums() for name in layers}
    order: list[str] = []  # of the first batch
    num_samples = 0

    def record(name: str, layer: nn.Module, values: Tensor) -> None:
        sums[name].add(values)
        if name not in order:
            order.append(name)
        elif num_samples and name == order[-1]:
            raise _LastLayerError

    for name, layer in layers.items():
        layer.training = True  # normalises with the batch
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: record(name, layer, inputs[0])
        )
    for batch in batches:
        with suppress(_LastLayerError):
            copied(batch.double())
        num_samples += len(batch)
    buffers = {}
    for name in order:
        buffers[f"{name}.running_mean"] = sums[name].mean.float()
        buffers[f"{name}.running_var"] = sums[name].variance.float()
        buffers[f"{name}.num_batches_tracked"] = torch.tensor(num_samples)
    return buffers
