"""Batch norm with fixed statistics and trained weights.

In training mode, batch norm would normalise with the statistics of one process's samples. The
gradient would then depend on how the batch is divided. With fixed statistics, it is an affine map
of each sample. The statistics are those of loaded weights, or are measured before the first step.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_FROZEN_CLASSES: dict[type, type] = {}


class FrozenStatistics:
    """Mixin of batch norm layers that stay in evaluation mode."""

    def train(self, mode: bool = True) -> nn.Module:
        """Keeps the layer in evaluation mode."""
        return super().train(False)


def freeze_batch_norms(backbone: nn.Module) -> list[str]:
    """Stops all batch norm layers from updating their statistics, in place.

    Layers keep their parameters and buffers, so that weights load and save as before.

    Returns:
        Names of the layers.
    """
    names = []
    for name, layer in backbone.named_modules():
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            layer.__class__ = _frozen_class(type(layer))
            layer.eval()
            names.append(name)
    return names


def has_frozen_statistics(layer: nn.Module) -> bool:
    """Returns whether a layer is a batch norm with fixed statistics."""
    return isinstance(layer, FrozenStatistics)


def _frozen_class(layer_class: type) -> type:
    """The class with FrozenStatistics, under its own name; one class for all layers."""
    if issubclass(layer_class, FrozenStatistics):
        return layer_class
    if layer_class not in _FROZEN_CLASSES:
        frozen = type(f"Frozen{layer_class.__name__}", (FrozenStatistics, layer_class), {})
        _FROZEN_CLASSES[layer_class] = frozen
    return _FROZEN_CLASSES[layer_class]
