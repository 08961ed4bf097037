"""The loss of a step: the sum of weight * loss over the objectives of its streams."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pretrain.config import Precision
from pretrain.data.batch import StepBatch
from pretrain.distributed.backward_scale import backward_scale
from pretrain.loss.options import Mode, Teacher
from pretrain.model.contrastive_model import StepFeatures
from pretrain.objectives.objective import (
    Objective,
    ObjectiveInputs,
    ObjectiveLoss,
    Temperature,
    objective_types,
)
from pretrain.sampling.order import pairs_of_ranks
from pretrain.settings.data import Stream, StreamName
from pretrain.training.step import NonFiniteLossError

# "<stream>/<objective>" -> teacher features of the stream's samples on this rank
TeacherFeatures = Mapping[str, Teacher]


@dataclass(frozen=True)
class StreamObjectives:
    """Objectives of one stream, equal in every step."""

    objectives: Mapping[str, Objective]  # by "<stream>/<objective>"
    counts: Sequence[int]  # [ranks] samples of each rank in a step that takes the stream
    backward_scale: float  # factor of the gradients (see pretrain.distributed.backward_scale)


@dataclass(frozen=True)
class StepObjectiveLosses:
    """Losses of a step by "<stream>/<objective>", with the temperatures they were computed at."""

    by_objective: dict[str, ObjectiveLoss]
    scales: dict[str, float]
    biases: dict[str, float]  # temperatures of sigmoid losses only
    total: float  # sum of weight * loss
    for_backward: Tensor

    def row(self) -> dict[str, Any]:
        """Returns the columns of a metrics row."""
        metrics: dict[str, dict[str, float]] = {}
        for key, loss in self.by_objective.items():
            for name, value in loss.metrics.items():
                metrics.setdefault(name, {})[key] = value
        return {
            "total_loss": self.total,
            "loss": {key: loss.value for key, loss in self.by_objective.items()},
            **metrics,
            "logit_scale": self.scales,
            "logit_bias": self.biases,
        }

    def progress_text(self) -> str:
        """Returns the temperatures for a progress line."""
        return "scale " + "/".join(f"{scale:.1f}" for scale in self.scales.values())


def build_objectives(
    streams: Mapping[StreamName, Stream],
    *,
    lanes: int,
    mode: Mode | Literal["auto"],
    precision: Precision,
    world_size: int,
) -> dict[StreamName, StreamObjectives]:
    """Builds the objectives of every stream.

    Args:
        streams: section of each stream.
        lanes: number of lanes of the sample order.
        mode: how losses are divided among processes.
        precision: precision of the towers.
        world_size: number of processes.
    """
    types = objective_types()
    return {
        name: StreamObjectives(
            {
                f"{name}/{objective}": types[section.kind](
                    objective, section, feature_type(precision), mode
                )
                for objective, section in stream.objectives.items()
            },
            counts=pairs_of_ranks(
                stream.global_batch_size // lanes, world_size=world_size, lanes=lanes
            ),
            backward_scale=backward_scale(precision, num_processes=world_size),
        )
        for name, stream in streams.items()
    }


def feature_type(precision: Precision) -> torch.dtype:
    """Returns the dtype of the contrasted features, which is that of the towers' computation.

    Features are exchanged and multiplied in this type. The loss itself is computed in float32.
    """
    return torch.bfloat16 if precision == "bf16" else torch.float32


class BegunObjectives:
    """Communication of objectives that runs while further views are encoded.

    Args:
        objectives: objectives of every stream in the step.
        batch: this rank's part of the step. Nothing is begun for objectives with views that samples
            may lack.
    """

    def __init__(self, objectives: Mapping[StreamName, StreamObjectives], batch: StepBatch) -> None:
        self.objectives = objectives
        self.lacking = {
            key
            for name, own in objectives.items()
            for key, objective in own.objectives.items()
            for view in objective.views
            if batch.streams[name].views[view].present is not None
        }
        self.begun: dict[str, Any] = {}

    def begin(self, stream: StreamName, name: str, features: Tensor) -> None:
        """Begins what the stream's objectives can do with a view; every rank must call it.

        Args:
            stream: name of the stream.
            name: name of the features of its samples.
            features: [B, D], L2-normalised.
        """
        if stream not in self.objectives:
            return
        own = self.objectives[stream]
        for key, objective in own.objectives.items():
            views = [view for view in objective.views if objective.features_of(view) == name]
            for view in views:
                if key in self.lacking or self.begun.get(key) is not None:
                    continue
                self.begun[key] = objective.begin(view, features, counts=own.counts)


def compute_losses(
    features: StepFeatures,
    batch: StepBatch,
    *,
    objectives: Mapping[StreamName, StreamObjectives],
    teachers: TeacherFeatures,
    begun: BegunObjectives,
) -> StepObjectiveLosses:
    """Computes every objective over the global batch; every rank must call it.

    Views and temperatures that no objective of the step reads still get a zero gradient, so that
    all engines update them in the same way.

    Args:
        features: features of all streams on this rank.
        batch: this rank's part of the step, on the device.
        objectives: objectives of the streams that the step takes.
        teachers: teacher features of the objectives with distillation.
        begun: communication that was started while views were encoded.
    """
    losses, parts, total = {}, [_zero_of(features, batch, objectives)], 0.0
    for name, own in objectives.items():
        views, found = batch.streams[name].views, features.views[name]
        for key, objective in own.objectives.items():
            read, outputs = objective.read(found)
            inputs = ObjectiveInputs(
                read,
                {view: views[view].keys for view in objective.views},
                _temperature(features, objective.temperature_name),
                own.counts,
                begun.begun.get(key),
                teachers.get(key),
                rows=rows_with_all(
                    [views[view].present for view in objective.views], features.views[name]
                ),
                outputs=outputs,
            )
            losses[key] = objective.loss(inputs)
            weight = objective.section.weight
            parts.append(weight * own.backward_scale * losses[key].for_backward)
            total += weight * losses[key].value
    return StepObjectiveLosses(
        by_objective=losses,
        scales={name: scale.item() for name, scale in features.scales.items()},
        biases={name: bias.item() for name, bias in features.biases.items()},
        total=total,
        for_backward=torch.stack([part.sum() for part in parts]).sum(),
    )


def rows_with_all(
    present: Sequence[Tensor | None], features: Mapping[str, Tensor]
) -> Tensor | None:
    """Returns the samples that have the modalities of all of some views.

    Args:
        present: bool [B] of each view, on the CPU; None if no sample can lack the modality.
        features: features of the samples, for their device.

    Returns:
        int64 [P] on that device; None if no sample can lack one of them, on any rank.
    """
    masks = [each for each in present if each is not None]
    if not masks:
        return None
    device = next(iter(features.values())).device
    return torch.stack(masks).all(dim=0).nonzero()[:, 0].to(device)


def _temperature(features: StepFeatures, name: str | None) -> Temperature | None:
    if name is None:
        return None
    return Temperature(features.scales[name], features.biases.get(name))


def _zero_of(
    features: StepFeatures, batch: StepBatch, objectives: Mapping[StreamName, StreamObjectives]
) -> Tensor:
    """Zero, with a graph to everything that no objective of the step reads."""
    used = {
        objective.temperature_name
        for own in objectives.values()
        for objective in own.objectives.values()
    }
    read = {
        (name, each)
        for name, own in objectives.items()
        for objective in own.objectives.values()
        for each in objective.read_names
    }
    unused = [
        *(
            found
            for stream, of_stream in features.views.items()
            for name, found in of_stream.items()
            if (stream, name) not in read
        ),
        *(scale for name, scale in features.scales.items() if name not in used),
        *(bias for name, bias in features.biases.items() if name not in used),
    ]
    first = next(iter(features.scales.values()))
    return sum((each.float().sum() * 0.0 for each in unused), first.new_zeros(()))


def refuse_non_finite(losses: StepObjectiveLosses) -> None:
    """Checks that the loss of every objective is finite.

    Raises:
        NonFiniteLossError: if a loss is not finite; the same on every rank.
    """
    for name, loss in losses.by_objective.items():
        if not math.isfinite(loss.value):
            raise NonFiniteLossError(f"loss of {name} is {loss.value}")
