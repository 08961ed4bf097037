"""Towers of modalities of kind `vector`: made features, sensor values, frozen embeddings."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from pretrain.settings.model import VectorTower
from pretrain.towers.masked_gru import MaskedGru


class VectorMlp(nn.Module):
    """Layers with GELU: [B, input_width] -> [B, W]."""

    has_blocks = False  # too small for recomputed activations

    def __init__(self, input_width: int, width: int, *, num_layers: int) -> None:
        super().__init__()
        widths = [input_width] + [width] * num_layers
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.GELU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, values: Tensor) -> Tensor:
        return self.layers(values)


class VectorGru(nn.Module):
    """A GRU over the rows of an array: [B, time, input_width] -> last states [B, W]."""

    has_blocks = False  # too small for recomputed activations

    def __init__(
        self, input_width: int, width: int, *, num_layers: int, is_bidirectional: bool
    ) -> None:
        super().__init__()
        self.layers = MaskedGru(
            input_width, width, num_layers=num_layers, is_bidirectional=is_bidirectional
        )

    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encodes arrays.

        Args:
            values: [B, time, input_width]; rows of padding may hold anything.
            lengths: int64 [B] rows that are not padding; None: all.
        """
        if lengths is None:
            lengths = values.new_full((len(values),), values.shape[1]).long()
        return self.layers(values, lengths)[1]


def build_vector_backbone(config: VectorTower, *, input_width: int) -> nn.Module:
    """Builds the encoder of vectors or of arrays of vectors, without projection.

    Args:
        config: config section of the tower.
        input_width: width of a vector, or of a row of an array.
    """
    if config.name == "mlp":
        return VectorMlp(input_width, config.width, num_layers=config.num_layers)
    return VectorGru(
        input_width,
        config.width,
        num_layers=config.num_layers,
        is_bidirectional=config.is_bidirectional,
    )
