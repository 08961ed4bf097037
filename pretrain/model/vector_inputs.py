"""Inputs of vector towers: standardised numbers, and their statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.settings.model import Model, VectorTower
from pretrain.towers.vector_towers import build_vector_backbone

if TYPE_CHECKING:
    from data_prep.modalities.modality import Modality
    from pretrain.data.sample_reader import SampleReader
    from pretrain.model.contrastive_model import ContrastiveModel


class StandardizedVectors(nn.Module):
    """Subtracts the mean of each column and divides by its standard deviation.

    Of vectors of shape [time, width], rows of padding become zero, and a last column tells which
    rows are not padding.

    Args:
        width: number of columns.
        max_rows: largest number of rows; None for vectors of shape [width].
    """

    def __init__(self, *, width: int, max_rows: int | None) -> None:
        super().__init__()
        self.shape = (width,) if max_rows is None else (max_rows, width)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def forward(self, values: Tensor, num_rows: Tensor | None = None) -> Tensor:
        """Standardises [B, width] -> the same, or [B, time, width] -> [B, time, width + 1]."""
        values = (values - self.mean) / self.std
        if num_rows is None:
            return values
        is_row = torch.arange(values.shape[1], device=values.device) < num_rows[:, None]  # [B, T]
        return torch.cat([values * is_row[..., None], is_row[..., None].to(values)], dim=-1)


class ArrayRows(nn.Module):
    """Encoder of arrays whose last column tells which rows are not padding.

    Args:
        encoder: module of (values [B, time, width], number of rows int64 [B]).
    """

    has_blocks = False  # too small for recomputed activations

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, values: Tensor) -> Tensor:
        """Encodes [B, time, width + 1] -> [B, W]."""
        return self.encoder(values[..., :-1], values[..., -1].sum(dim=1).long())


def build_backbone_of_vectors(
    config: VectorTower, *, width: int, max_rows: int | None
) -> nn.Module:
    """Builds the encoder of the output of StandardizedVectors."""
    backbone = build_vector_backbone(config, input_width=width)
    return backbone if max_rows is None else ArrayRows(backbone)


# ---------------------------------------------------------------------------------- statistics


def standardize_vectors(
    model: ContrastiveModel, config: Model, sources: Sequence[SampleReader]
) -> None:
    """Sets the mean and standard deviation of each vector tower's columns to those of the data.

    They are computed over all vectors of the datasets that a run starts with, also over samples
    that a subset leaves out. Checkpoints store them.

    Args:
        model: model before training.
        config: config section `model`.
        sources: readers of the sources that the run starts with.

    Raises:
        InputError: if a dataset does not record the statistics, or none of them has the vectors.
    """
    for tower in config.towers:
        if config.kinds[tower] != "vector":
            continue
        found = {
            (reader.dataset.info.fingerprint, form.view.member): reader.dataset
            for reader in sources
            for form in reader.formats.values()
            if config.tower_of(form.view.modality) == tower
        }
        if not found:
            raise InputError(
                f"{config.tower_key(tower)}: no source that the run starts with has its vectors, "
                "by which they are standardised; add one to `sources` of a stream"
            )
        modalities = [
            _with_statistics(dataset.modalities[member], f"{dataset.folder}: {member}")
            for (_, member), dataset in sorted(found.items())
        ]
        stage = model.towers[tower].input_stage
        with_rows = [each for each in modalities if each.num_rows]
        if not with_rows:
            raise InputError(
                f"{config.tower_key(tower)}: no sample of the sources that the run starts with has "
                "these vectors"
            )
        mean, std = pooled_statistics(with_rows)
        stage.mean.copy_(mean)
        stage.std.copy_(torch.where(std > 0, std, 1.0))  # a constant column becomes zero


def _with_statistics(modality: Modality, where: str) -> Modality:
    if modality.mean is None or modality.std is None or modality.num_rows is None:
        raise InputError(
            f"{where}: expected mean and standard deviation of its vectors in dataset.json, found "
            "none; make the dataset again with python -m data_prep.make_shards"
        )
    return modality


def pooled_statistics(modalities: Sequence[Modality]) -> tuple[Tensor, Tensor]:
    """Computes mean and standard deviation of the columns over several datasets.

    Returns:
        float64 [width] each.
    """
    counts = torch.tensor([each.num_rows for each in modalities], dtype=torch.float64)[:, None]
    means = torch.tensor([each.mean for each in modalities], dtype=torch.float64)
    variances = torch.tensor([each.std for each in modalities], dtype=torch.float64) ** 2
    mean = (counts * means).sum(dim=0) / counts.sum()
    variance = (counts * (variances + (means - mean) ** 2)).sum(dim=0) / counts.sum()
    return mean, variance.sqrt()
