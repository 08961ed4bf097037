"""The gradient of one step's loss, with the batch encoded whole or in micro-batches.

In micro-batches it follows gradient caching (Gao et al. 2021, "Scaling deep contrastive learning
batch size under memory limited setup"): all are encoded without graph, the loss is taken once over
the whole global batch, then each is encoded again and the cached gradients of its features are
back-propagated. So micro-batches never change which pairs are contrasted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.caption_trimming import trimmed_length
from pretrain.config import PairingName, PretrainConfig
from pretrain.contrastive_loss import ContrastiveLoss, softmax_loss
from pretrain.engine import Engine
from pretrain.gather import world_size
from pretrain.model import PairingFeatures, PairInputs
from pretrain.pair_batch import PairingBatch, StepBatch

EncoderInputs = Mapping[PairingName, PairInputs]


@dataclass(frozen=True)
class StepLosses:
    """The losses of a step and the temperatures they were taken at."""

    by_pairing: dict[PairingName, ContrastiveLoss]
    scales: dict[PairingName, float]
    total: float  # sum of weight * loss: what is minimised
    for_backward: Tensor


def backward_of_step(engine: Engine, batch: StepBatch, config: PretrainConfig) -> StepLosses:
    """Adds the gradient of a step's loss, encoding at most micro_batch_size pairs at once.

    Args:
        engine: holds the model.
        batch: this rank's share, on the device.
        config: the whole config.

    Raises:
        FloatingPointError: the loss is not finite; no gradient was taken.
    """
    pieces = micro_batches(
        batch,
        num_pieces=num_micro_batches(config, num_processes=world_size()),
        trims_captions=engine.model.takes_trimmed_captions,
    )
    # With one pairing per step, its weight has been used in choosing it.
    takes_all = config.pairings_per_step == "all"
    weights = {name: config.pairings[name].weight if takes_all else 1.0 for name in batch.taken}
    if len(pieces) == 1:
        return backward_whole_batch(engine, pieces[0], weights=weights)
    return backward_in_micro_batches(engine, pieces, weights=weights)


def take_losses(
    features: Mapping[PairingName, PairingFeatures], *, weights: Mapping[PairingName, float]
) -> StepLosses:
    """The loss of every pairing over its global batch; every rank must call it.

    Pairings without a weight have no part in the step. Their towers get a gradient of zero all the
    same, so that every engine does the same with them.
    """
    losses = {name: softmax_loss(*features[name]) for name in weights}
    parts = [weights[name] * loss.for_backward for name, loss in losses.items()]
    parts += [_zero_of(features[name]) for name in features if name not in weights]
    return StepLosses(
        by_pairing=losses,
        scales={name: scale.item() for name, (_, _, scale) in features.items()},
        total=sum(weights[name] * loss.value for name, loss in losses.items()),
        for_backward=torch.stack([part.sum() for part in parts]).sum(),
    )


def _zero_of(features: PairingFeatures) -> Tensor:
    return sum(part.sum() for part in features) * 0.0


def backward_whole_batch(
    engine: Engine, inputs: EncoderInputs, *, weights: Mapping[PairingName, float]
) -> StepLosses:
    """Encodes this rank's pairs at once and back-propagates the global loss.

    Raises:
        FloatingPointError: the loss is not finite; no gradient was taken.
    """
    losses = take_losses(engine.forward(inputs), weights=weights)
    refuse_non_finite(losses)
    engine.backward(losses.for_backward)
    return losses


def backward_in_micro_batches(
    engine: Engine,
    pieces: list[EncoderInputs],
    *,
    weights: Mapping[PairingName, float],
) -> StepLosses:
    """The same gradient from micro-batches; all ranks have equally many.

    Raises:
        FloatingPointError: the loss is not finite; no gradient was taken.
    """
    with torch.no_grad():
        encoded = [engine.forward(piece) for piece in pieces]
    features = {
        name: tuple(
            torch.cat([piece[name][part] for piece in encoded]).requires_grad_()
            for part in range(2)
        )
        for name in pieces[0]
    }
    scales = {name: encoded[0][name][2].clone().requires_grad_() for name in pieces[0]}
    losses = take_losses(
        {name: (*features[name], scales[name]) for name in features}, weights=weights
    )
    refuse_non_finite(losses)
    losses.for_backward.backward()
    for number, piece in enumerate(pieces):
        with engine.micro_batch(is_last=number == len(pieces) - 1):
            engine.backward(
                _surrogate(engine.forward(piece), features, scales, number, len(pieces))
            )
    return losses


def micro_batches(
    batch: StepBatch, *, num_pieces: int, trims_captions: bool
) -> list[EncoderInputs]:
    """What the towers are given of each piece of a step; pieces may hold no pair.

    Args:
        batch: this rank's share of a step, on the device.
        num_pieces: equal on all ranks.
        trims_captions: whether tokens are cut to the longest caption of each piece.
    """
    pieces = {
        name: _split(pairs, num_pieces, trims_captions) for name, pairs in batch.pairings.items()
    }
    return [{name: pieces[name][number] for name in pieces} for number in range(num_pieces)]


def _split(pairs: PairingBatch, num_pieces: int, trims_captions: bool) -> list[PairInputs]:
    tokens = pairs.tokens.tensor_split(num_pieces)
    if trims_captions:
        lengths = pairs.caption_lengths.tensor_split(num_pieces)
        tokens = [
            piece[:, : trimmed_length(longest, context_length=piece.shape[1])]
            for piece, longest in zip(tokens, lengths, strict=True)
        ]
    has_stripes = pairs.stripes.shape[1] > 0
    stripes = pairs.stripes.tensor_split(num_pieces) if has_stripes else [None] * num_pieces
    media = pairs.media.tensor_split(num_pieces)
    return [PairInputs(*each) for each in zip(media, tokens, stripes, strict=True)]


def _surrogate(
    encoded: Mapping[PairingName, PairingFeatures],
    features: Mapping[PairingName, tuple[Tensor, Tensor]],
    scales: Mapping[PairingName, Tensor],
    number: int,
    num_pieces: int,
) -> Tensor:
    """A scalar whose gradient, at this micro-batch, is that of the loss."""
    total = torch.zeros((), device=next(iter(scales.values())).device)
    for name, (media, text, scale) in encoded.items():
        for part, cached in zip((media, text), features[name], strict=True):
            total = total + (part * cached.grad.tensor_split(num_pieces)[number]).sum()
        # Each micro-batch carries its share of the scale's gradient, so that none leaves it out.
        total = total + (scale * scales[name].grad).sum() / num_pieces
    return total


def num_micro_batches(config: PretrainConfig, *, num_processes: int) -> int:
    """Micro-batches per step, the same on every rank: enough that none encodes more than
    micro_batch_size pairs of a pairing at once."""
    if config.micro_batch_size == "auto":
        return 1
    most_lanes = -(-config.lanes // num_processes)
    most_pairs = most_lanes * max(config.slots_per_lane(name) for name in config.pairings)
    return -(-most_pairs // config.micro_batch_size)


def refuse_non_finite(losses: StepLosses) -> None:
    """
    Raises:
        FloatingPointError: a loss is not finite; the same on every rank.
    """
    for name, loss in losses.by_pairing.items():
        if not math.isfinite(loss.value):
            raise FloatingPointError(f"loss of {name} is {loss.value}")
