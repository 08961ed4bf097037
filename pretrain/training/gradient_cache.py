"""The gradient of one step's loss, with the batch encoded at once or in micro-batches.

Micro-batches use gradient caching (Gao et al. 2021, "Scaling deep contrastive learning batch size
under memory limited setup"):

    1. encode all micro-batches without a graph
    2. compute the loss, and its gradients with respect to features, over the whole global batch
    3. encode each micro-batch again, with the same dropout, and back-propagate these gradients

Therefore micro-batches never change which pairs are contrasted.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pretrain.config import PairingName
from pretrain.data.batch import PairingBatch, StepBatch
from pretrain.distributed.engine import Engine
from pretrain.model.caption_trimming import trimmed_length
from pretrain.model.contrastive_model import EncoderInputs, PairingFeatures, PairInputs
from pretrain.model.sample_dropout import DropKeys
from pretrain.monitoring.timing import PhaseTimer
from pretrain.training.step_loss import (
    ContrastiveLosses,
    LossTerm,
    PendingGather,
    compute_losses,
    refuse_non_finite,
)


def backward_whole_batch(
    engine: Engine,
    inputs: EncoderInputs,
    *,
    terms: Mapping[PairingName, LossTerm],
    timer: PhaseTimer,
) -> ContrastiveLosses:
    """Encodes this rank's pairs at once and back-propagates the global loss.

    Raises:
        NonFiniteLossError: if the loss is not finite; no gradient was computed.
    """
    pending = PendingGather(terms)
    with timer.phase("forward"):
        features = engine.forward([inputs], on_media=pending.begin)
    with timer.phase("gather"):
        losses = compute_losses(features, terms=terms, pending=pending)
    refuse_non_finite(losses)
    with timer.phase("backward"):
        engine.backward(losses.for_backward)
    return losses


def backward_in_micro_batches(
    engine: Engine,
    micro_batches: list[EncoderInputs],
    *,
    terms: Mapping[PairingName, LossTerm],
    timer: PhaseTimer,
) -> ContrastiveLosses:
    """Computes the same gradient in micro-batches, as many on every rank.

    Raises:
        NonFiniteLossError: if the loss is not finite; no gradient was computed.
    """
    pending = PendingGather(terms)
    with timer.phase("forward"), torch.no_grad():
        encoded = engine.forward(micro_batches, on_media=pending.begin)
    features = {name: _leaves(values) for name, values in encoded.items()}
    with timer.phase("gather"):
        losses = compute_losses(features, terms=terms, pending=pending)
    refuse_non_finite(losses)
    with timer.phase("backward"):
        losses.for_backward.backward()
        for number, micro_batch in enumerate(micro_batches):
            with engine.micro_batch(is_last=number == len(micro_batches) - 1):
                engine.backward(
                    _surrogate(engine.forward([micro_batch]), features, number, len(micro_batches))
                )
    return losses


def split_into_micro_batches(
    batch: StepBatch, *, num_micro_batches: int, trims_captions: bool
) -> list[EncoderInputs]:
    """Splits this rank's part of a step into micro-batches; some may hold no pair.

    Args:
        batch: this rank's part of a step, on the device.
        num_micro_batches: number of micro-batches, equal on all ranks.
        trims_captions: whether tokens are cut to the longest caption of each micro-batch.
    """
    micro_batches = {
        name: _split(pairs, batch.step, num_micro_batches, trims_captions)
        for name, pairs in batch.pairings.items()
    }
    return [
        {name: micro_batches[name][number] for name in micro_batches}
        for number in range(num_micro_batches)
    ]


def _split(
    pairs: PairingBatch, step: int, num_micro_batches: int, trims_captions: bool
) -> list[PairInputs]:
    tokens = pairs.tokens.tensor_split(num_micro_batches)
    if trims_captions:
        lengths = pairs.caption_lengths.tensor_split(num_micro_batches)
        tokens = [
            micro_batch[:, : trimmed_length(longest, context_length=micro_batch.shape[1])]
            for micro_batch, longest in zip(tokens, lengths, strict=True)
        ]
    spec_masks = [None] * num_micro_batches
    if pairs.spec_masks.shape[1] > 0:
        spec_masks = pairs.spec_masks.tensor_split(num_micro_batches)
    media = pairs.media.tensor_split(num_micro_batches)
    drop_keys = _drop_keys(pairs, step, num_micro_batches)
    return [PairInputs(*each) for each in zip(media, tokens, spec_masks, drop_keys, strict=True)]


def _drop_keys(pairs: PairingBatch, step: int, num_micro_batches: int) -> list[DropKeys]:
    """Slots of every micro-batch, so that dropout is equal in both passes and for every split."""
    device = pairs.tokens.device
    slots = torch.arange(len(pairs.tokens), device=device) + pairs.first_slot
    number = torch.full((), step, dtype=torch.int64, device=device)
    return [DropKeys(number, micro_batch) for micro_batch in slots.tensor_split(num_micro_batches)]


def _leaves(features: PairingFeatures) -> PairingFeatures:
    """The same values as leaf tensors, which accumulate the gradient of the loss."""
    return PairingFeatures(*(None if each is None else each.requires_grad_() for each in features))


def _surrogate(
    encoded: Mapping[PairingName, PairingFeatures],
    features: Mapping[PairingName, PairingFeatures],
    number: int,
    num_micro_batches: int,
) -> Tensor:
    """A scalar with the gradient of the loss with respect to this micro-batch's features."""
    products = []
    for name, micro_batch in encoded.items():
        cached = features[name]
        for part, whole in ((micro_batch.media, cached.media), (micro_batch.text, cached.text)):
            products.append(part * whole.grad.tensor_split(num_micro_batches)[number])
        # These gradients are divided among micro-batches, because DDP expects them in every one.
        products.append(micro_batch.scale * cached.scale.grad / num_micro_batches)
        if micro_batch.bias is not None:
            products.append(micro_batch.bias * cached.bias.grad / num_micro_batches)
    return torch.stack([product.sum() for product in products]).sum()
