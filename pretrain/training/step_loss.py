"""What a step minimises: the sum of weight * loss over its pairings, each over its global batch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.config import PairingName, PretrainConfig
from pretrain.data.batch import PairingBatch, StepBatch
from pretrain.distributed.collectives import RowGather, world_size
from pretrain.loss.contrastive_loss import ContrastiveLoss, begin_gather, contrastive_loss
from pretrain.loss.options import LossOptions, Teacher, build_loss_options
from pretrain.model.contrastive_model import PairingFeatures
from pretrain.sampling.order import pairs_of_ranks


@dataclass(frozen=True)
class LossTerm:
    """The part of one pairing in what a step minimises."""

    weight: float
    options: LossOptions
    keys: tuple[Tensor, Tensor]  # of media and captions, each int64 [B]: equal keys, equal content
    counts: Sequence[int]  # [ranks] pairs of each
    feature_type: torch.dtype
    teacher: Teacher | None = None


@dataclass(frozen=True)
class StepLosses:
    """The losses of a step, and the temperatures and biases they were taken at."""

    by_pairing: dict[PairingName, ContrastiveLoss]
    scales: dict[PairingName, float]
    biases: dict[PairingName, float]  # of sigmoid losses
    total: float  # sum of weight * loss: what is minimised
    for_backward: Tensor


def terms_of_step(
    config: PretrainConfig, batch: StepBatch, *, teachers: Mapping[PairingName, Teacher]
) -> dict[PairingName, LossTerm]:
    """The terms of the pairings that a step takes.

    Args:
        config: the whole config.
        batch: this rank's share, on the device.
        teachers: features of the pairings that have one.
    """
    return {
        name: _term(config, name, batch.pairings[name], teachers.get(name)) for name in batch.taken
    }


def _term(
    config: PretrainConfig, name: PairingName, pairs: PairingBatch, teacher: Teacher | None
) -> LossTerm:
    pairing = config.pairings[name]
    return LossTerm(
        # With one pairing per step, its weight has been used in choosing it.
        weight=pairing.weight if config.pairings_per_step == "all" else 1.0,
        options=build_loss_options(pairing, mode=config.engine.loss_mode),
        keys=(pairs.media_keys, pairs.caption_keys),
        counts=pairs_of_ranks(
            config.slots_per_lane(name), world_size=world_size(), lanes=config.lanes
        ),
        feature_type=feature_type(config),
        teacher=teacher,
    )


def feature_type(config: PretrainConfig) -> torch.dtype:
    """Of the features that are contrasted: rounded to what the towers computed in, so that they
    travel and are multiplied as such. The loss itself is taken in float32."""
    return torch.bfloat16 if config.engine.precision == "bf16" else torch.float32


class PendingGather:
    """Media features on their way to the other ranks while captions are encoded."""

    def __init__(self, terms: Mapping[PairingName, LossTerm]) -> None:
        self.terms = terms
        self.gathers: dict[PairingName, RowGather | None] = {}

    def begin(self, name: PairingName, media: Tensor) -> None:
        """Sends this rank's [B, D] of a pairing that has a term; every rank must call it."""
        term = self.terms.get(name)
        if term is not None and term.teacher is None:
            media = media.to(term.feature_type)
            self.gathers[name] = begin_gather(media, options=term.options, counts=term.counts)


def take_losses(
    features: Mapping[PairingName, PairingFeatures],
    *,
    terms: Mapping[PairingName, LossTerm],
    pending: PendingGather,
) -> StepLosses:
    """The loss of every pairing over its global batch; every rank must call it.

    Pairings without a term have no part in the step. Their towers get a gradient of zero all the
    same, so that every engine does the same with them.
    """
    losses = {
        name: _take_loss(features[name], term, pending.gathers.get(name))
        for name, term in terms.items()
    }
    parts = [terms[name].weight * loss.for_backward for name, loss in losses.items()]
    parts += [_zero_of(features[name]) for name in features if name not in terms]
    return StepLosses(
        by_pairing=losses,
        scales={name: each.scale.item() for name, each in features.items()},
        biases={name: each.bias.item() for name, each in features.items() if each.bias is not None},
        total=sum(terms[name].weight * loss.value for name, loss in losses.items()),
        for_backward=torch.stack([part.sum() for part in parts]).sum(),
    )


def _take_loss(
    features: PairingFeatures, term: LossTerm, media_gather: RowGather | None
) -> ContrastiveLoss:
    return contrastive_loss(
        features.media.to(term.feature_type),
        features.text.to(term.feature_type),
        features.scale,
        features.bias,
        options=term.options,
        keys=term.keys,
        teacher=term.teacher,
        counts=term.counts,
        media_gather=media_gather,
    )


def _zero_of(features: PairingFeatures) -> Tensor:
    return sum(part.sum() for part in features if part is not None) * 0.0


class NonFiniteLossError(FloatingPointError):
    """A loss is not finite; no gradient was taken."""


def refuse_non_finite(losses: StepLosses) -> None:
    """
    Raises:
        NonFiniteLossError: a loss is not finite; the same on every rank.
    """
    for name, loss in losses.by_pairing.items():
        if not math.isfinite(loss.value):
            raise NonFiniteLossError(f"loss of {name} is {loss.value}")
