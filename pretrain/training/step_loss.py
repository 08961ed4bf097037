"""The training objective: the sum of weight * loss over a step's pairings, in the global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.config import Pairing, PairingName, Precision
from pretrain.data.batch import StepBatch
from pretrain.distributed.backward_scale import backward_scale
from pretrain.distributed.collectives import RowGather
from pretrain.loss.contrastive_loss import ContrastiveLoss, begin_gather, contrastive_loss
from pretrain.loss.options import LossOptions, Mode, Teacher, build_loss_options
from pretrain.model.contrastive_model import PairingFeatures
from pretrain.sampling.order import pairs_of_ranks
from pretrain.training.step import NonFiniteLossError


@dataclass(frozen=True)
class PairingLoss:
    """Settings of one pairing's loss, equal in every step."""

    weight: float
    options: LossOptions
    counts: Sequence[int]  # [ranks] pairs of each rank in a step
    feature_type: torch.dtype
    backward_scale: float  # factor of its gradients (see pretrain.distributed.backward_scale)


@dataclass(frozen=True)
class LossTerm:
    """Loss of one pairing in one step."""

    loss: PairingLoss
    keys: tuple[Tensor, Tensor]  # content hashes of media and captions, int64 [B] each
    teacher: Teacher | None = None


@dataclass(frozen=True)
class ContrastiveLosses:
    """Losses of a step by pairing, with the temperatures and biases that they were computed at."""

    by_pairing: dict[PairingName, ContrastiveLoss]
    scales: dict[PairingName, float]
    biases: dict[PairingName, float]  # pairings with sigmoid loss only
    total: float  # sum of weight * loss
    for_backward: Tensor

    def row(self) -> dict[str, Any]:
        """Returns the columns of a metrics row."""
        losses = self.by_pairing
        return {
            "total_loss": self.total,
            "loss": {name: loss.value for name, loss in losses.items()},
            "media_to_text_recall@1": {
                name: loss.media_to_text_recall_at_1 for name, loss in losses.items()
            },
            "text_to_media_recall@1": {
                name: loss.text_to_media_recall_at_1 for name, loss in losses.items()
            },
            "logit_scale": self.scales,
            "logit_bias": self.biases,
        }

    def progress_text(self) -> str:
        """Returns the temperatures for a progress line."""
        return "scale " + "/".join(f"{scale:.1f}" for scale in self.scales.values())


def build_pairing_losses(
    pairings: Mapping[PairingName, Pairing],
    *,
    lanes: int,
    takes_all: bool,
    mode: Mode | Literal["auto"],
    precision: Precision,
    world_size: int,
) -> dict[PairingName, PairingLoss]:
    """Builds the loss of every pairing.

    Args:
        pairings: section of each pairing.
        lanes: number of lanes of the sample order.
        takes_all: whether a step takes all pairings. Otherwise the weight of a pairing is its
            fraction of the steps, and does not scale its loss.
        mode: how the loss is divided among processes.
        precision: precision of the towers.
        world_size: number of processes.
    """
    return {
        name: PairingLoss(
            weight=pairing.weight if takes_all else 1.0,
            options=build_loss_options(pairing, mode=mode),
            counts=pairs_of_ranks(
                pairing.global_batch_size // lanes, world_size=world_size, lanes=lanes
            ),
            feature_type=feature_type(precision),
            backward_scale=backward_scale(precision, num_processes=world_size),
        )
        for name, pairing in pairings.items()
    }


def terms_of_step(
    losses: Mapping[PairingName, PairingLoss],
    batch: StepBatch,
    *,
    teacher_features: Mapping[PairingName, Teacher],
) -> dict[PairingName, LossTerm]:
    """Returns the loss terms of the pairings in a step.

    Args:
        losses: loss of every pairing.
        batch: this rank's part of the step, on the device.
        teacher_features: teacher features of the pairings with distillation.
    """
    terms = {}
    for name in batch.taken:
        pairs = batch.pairings[name]
        keys = (pairs.media_keys, pairs.caption_keys)
        terms[name] = LossTerm(losses[name], keys, teacher_features.get(name))
    return terms


def feature_type(precision: Precision) -> torch.dtype:
    """Returns the dtype of the contrasted features, which is that of the towers' computation.

    Features are exchanged and multiplied in this type. The loss itself is computed in float32.
    """
    return torch.bfloat16 if precision == "bf16" else torch.float32


class PendingGather:
    """Gathers of media features from all ranks, which run while captions are encoded."""

    def __init__(self, terms: Mapping[PairingName, LossTerm]) -> None:
        self.terms = terms
        self.gathers: dict[PairingName, RowGather | None] = {}

    def begin(self, name: PairingName, media: Tensor) -> None:
        """Starts the gather of this rank's media features; every rank must call it.

        Args:
            name: pairing.
            media: [B, D], L2-normalised.
        """
        term = self.terms.get(name)
        if term is not None and term.teacher is None:
            media = media.to(term.loss.feature_type)
            self.gathers[name] = begin_gather(
                media, options=term.loss.options, counts=term.loss.counts
            )


def compute_losses(
    features: Mapping[PairingName, PairingFeatures],
    *,
    terms: Mapping[PairingName, LossTerm],
    pending: PendingGather,
) -> ContrastiveLosses:
    """Computes the loss of every pairing over its global batch; every rank must call it.

    A pairing without a term is not part of the step. Its towers still get a zero gradient, so that
    all engines update them in the same way.
    """
    losses = {
        name: _compute_loss(features[name], term, pending.gathers.get(name))
        for name, term in terms.items()
    }
    weights = {name: term.loss.weight * term.loss.backward_scale for name, term in terms.items()}
    parts = [weights[name] * loss.for_backward for name, loss in losses.items()]
    parts += [_zero_of(features[name]) for name in features if name not in terms]
    return ContrastiveLosses(
        by_pairing=losses,
        scales={name: each.scale.item() for name, each in features.items()},
        biases={name: each.bias.item() for name, each in features.items() if each.bias is not None},
        total=sum(terms[name].loss.weight * loss.value for name, loss in losses.items()),
        for_backward=torch.stack([part.sum() for part in parts]).sum(),
    )


def _compute_loss(
    features: PairingFeatures, term: LossTerm, media_gather: RowGather | None
) -> ContrastiveLoss:
    return contrastive_loss(
        features.media,
        features.text,
        features.scale,
        features.bias,
        options=term.loss.options,
        keys=term.keys,
        teacher=term.teacher,
        counts=term.loss.counts,
        media_gather=media_gather,
        feature_type=term.loss.feature_type,
    )


def _zero_of(features: PairingFeatures) -> Tensor:
    return sum(part.sum() for part in features if part is not None) * 0.0


def refuse_non_finite(losses: ContrastiveLosses) -> None:
    """Checks that the loss of every pairing is finite.

    Raises:
        NonFiniteLossError: if a loss is not finite; the same on every rank.
    """
    for name, loss in losses.by_pairing.items():
        if not math.isfinite(loss.value):
            raise NonFiniteLossError(f"loss of {name} is {loss.value}")
