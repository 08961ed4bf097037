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
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.data.batch import StepBatch, StreamBatch, ViewBatch
from pretrain.distributed.engine import Engine
from pretrain.model.caption_trimming import trimmed_length
from pretrain.model.contrastive_model import (
    EncoderInputs,
    PresentRows,
    StepFeatures,
    StreamInputs,
)
from pretrain.model.sample_dropout import DropKeys
from pretrain.monitoring.timing import PhaseTimer
from pretrain.settings.data import StreamName
from pretrain.training.step_loss import (
    BegunObjectives,
    StepObjectiveLosses,
    StreamObjectives,
    TeacherFeatures,
    compute_losses,
    refuse_non_finite,
)


@dataclass(frozen=True)
class StepTerms:
    """What the losses of a step read, in addition to the features."""

    batch: StepBatch  # this rank's part, on the device
    objectives: Mapping[StreamName, StreamObjectives]  # of the streams that the step takes
    teachers: TeacherFeatures

    def losses(self, features: StepFeatures, begun: BegunObjectives) -> StepObjectiveLosses:
        """Computes the losses; every rank must call it.

        Raises:
            NonFiniteLossError: if a loss is not finite.
        """
        losses = compute_losses(
            features,
            self.batch,
            objectives=self.objectives,
            teachers=self.teachers,
            begun=begun,
        )
        refuse_non_finite(losses)
        return losses


def backward_whole_batch(
    engine: Engine, inputs: EncoderInputs, *, terms: StepTerms, timer: PhaseTimer
) -> StepObjectiveLosses:
    """Encodes this rank's samples at once and back-propagates the global loss.

    Raises:
        NonFiniteLossError: if the loss is not finite; no gradient was computed.
    """
    begun = BegunObjectives(terms.objectives, terms.batch)
    with timer.phase("forward"):
        features = engine.forward([inputs], on_view=begun.begin)
    with timer.phase("gather"):
        losses = terms.losses(features, begun)
    with timer.phase("backward"):
        engine.backward(losses.for_backward)
    return losses


def backward_in_micro_batches(
    engine: Engine, micro_batches: list[EncoderInputs], *, terms: StepTerms, timer: PhaseTimer
) -> StepObjectiveLosses:
    """Computes the same gradient in micro-batches, as many on every rank.

    Raises:
        NonFiniteLossError: if the loss is not finite; no gradient was computed.
    """
    begun = BegunObjectives(terms.objectives, terms.batch)
    with timer.phase("forward"), torch.no_grad():
        features = engine.forward(micro_batches, on_view=begun.begin)
    for each in _tensors_of(features):
        each.requires_grad_()  # a leaf, which accumulates the gradient of the loss
    with timer.phase("gather"):
        losses = terms.losses(features, begun)
    with timer.phase("backward"):
        losses.for_backward.backward()
        for number, micro_batch in enumerate(micro_batches):
            with engine.micro_batch(is_last=number == len(micro_batches) - 1):
                encoded = engine.forward([micro_batch])
                engine.backward(_surrogate(encoded, features, number, len(micro_batches)))
    return losses


def split_into_micro_batches(
    batch: StepBatch, *, num_micro_batches: int, trims_captions: bool, is_taught: bool = False
) -> list[EncoderInputs]:
    """Splits this rank's part of a step into micro-batches; some may hold no sample.

    Args:
        batch: this rank's part of a step, on the device.
        num_micro_batches: number of micro-batches, equal on all ranks.
        trims_captions: whether tokens are cut to the longest text of each micro-batch.
        is_taught: whether the inputs include those that only teachers read.
    """
    micro_batches = {
        name: _split(
            each if is_taught else each.without_teachers,
            batch.step,
            num_micro_batches,
            trims_captions,
        )
        for name, each in batch.streams.items()
    }
    return [
        {name: micro_batches[name][number] for name in micro_batches}
        for number in range(num_micro_batches)
    ]


def _split(
    batch: StreamBatch, step: int, num_micro_batches: int, trims_captions: bool
) -> list[StreamInputs]:
    views = {
        view: _split_view(each, num_micro_batches, trims_captions)
        for view, each in batch.views.items()
    }
    drop_keys = _drop_keys(batch, step, num_micro_batches)
    return [
        _present_alone(
            StreamInputs({view: parts[number] for view, parts in views.items()}, drop_keys[number]),
            {
                view: each.present.tensor_split(num_micro_batches)[number]
                for view, each in batch.views.items()
                if each.present is not None
            },
        )
        for number in range(num_micro_batches)
    ]


def _present_alone(inputs: StreamInputs, present: Mapping[str, Tensor]) -> StreamInputs:
    """The inputs without the rows of samples that lack a view's modality.

    Args:
        inputs: inputs of all samples.
        present: view -> bool [B], on the CPU.
    """
    views, rows = dict(inputs.views), {}
    for view, has_it in present.items():
        device = views[view][0].device
        numbers = has_it.nonzero()[:, 0].to(device, non_blocking=True)
        views[view] = tuple(values[numbers] for values in views[view])
        rows[view] = PresentRows(numbers, has_it)
    return inputs._replace(views=views, present=rows)


def _split_view(
    view: ViewBatch, num_micro_batches: int, trims_captions: bool
) -> list[tuple[Tensor, ...]]:
    parts = [values.tensor_split(num_micro_batches) for values in view.inputs]
    if view.lengths is not None and trims_captions:
        lengths = view.lengths.tensor_split(num_micro_batches)
        parts[0] = [
            tokens[:, : trimmed_length(longest, context_length=tokens.shape[1])]
            for tokens, longest in zip(parts[0], lengths, strict=True)
        ]
    return list(zip(*parts, strict=True))


def _drop_keys(batch: StreamBatch, step: int, num_micro_batches: int) -> list[DropKeys]:
    """Slots of every micro-batch, so that dropout is equal in both passes and for every split."""
    device = next(iter(batch.views.values())).values.device
    slots = torch.arange(len(batch), device=device) + batch.first_slot
    number = torch.full((), step, dtype=torch.int64, device=device)
    return [DropKeys(number, micro_batch) for micro_batch in slots.tensor_split(num_micro_batches)]


def _tensors_of(features: StepFeatures) -> list[Tensor]:
    views = [view for of_stream in features.views.values() for view in of_stream.values()]
    return [*views, *features.scales.values(), *features.biases.values()]


def _surrogate(
    encoded: StepFeatures, features: StepFeatures, number: int, num_micro_batches: int
) -> Tensor:
    """A scalar with the gradient of the loss with respect to this micro-batch's features."""
    products = [
        part * features.views[stream][view].grad.tensor_split(num_micro_batches)[number]
        for stream, of_stream in encoded.views.items()
        for view, part in of_stream.items()
    ]
    # These gradients are divided among micro-batches, because DDP expects them in every one.
    for kind in ("scales", "biases"):
        cached = getattr(features, kind)
        products += [
            value * cached[name].grad / num_micro_batches
            for name, value in getattr(encoded, kind).items()
        ]
    return torch.stack([product.sum() for product in products]).sum()
