"""Sizes of a planned model: parameters, optimizer state, and the passes over its samples."""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config import PretrainConfig
from pretrain.model.sample_dropout import set_patch_dropout
from pretrain.optimization.optimizer import num_state_values
from pretrain.planning.passes import StreamPass, measure_passes
from pretrain.planning.planned_model import Layouts, PlannedModel
from pretrain.settings.data import StreamName
from pretrain.settings.segments import value_at


@dataclass(frozen=True)
class SizesOfSegment:
    """Sizes of steps with images of one size.

    Attributes:
        num_steps: number of these steps.
        layouts: layout of the rows of each stream.
        passes: FLOPs and memory of a pass over each stream.
    """

    num_steps: int
    layouts: Layouts
    passes: dict[StreamName, StreamPass]


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a model that do not depend on processes and hardware.

    Attributes:
        num_parameters: number of all parameters.
        num_trained: number of trained parameters.
        num_state_values: number of elements of the optimizer's tensors.
        buffer_bytes: bytes of all buffers.
        segments: sizes of the segments of images; one without segments.
    """

    num_parameters: int
    num_trained: int
    num_state_values: int
    buffer_bytes: int
    segments: list[SizesOfSegment]


def measure_model(config: PretrainConfig, planned: PlannedModel, *, is_gpu: bool) -> ModelSizes:
    """Measures the model of a config, and freezes parameters of towers that nothing uses.

    `probe_backbone` freezes them in a model with values.

    Args:
        config: config of the run.
        planned: its model.
        is_gpu: whether autocast is that of GPUs.

    Raises:
        InputError: if a tower cannot be planned.
    """
    segments, used = [], set()
    steps = [step for step in planned.layouts if step < config.schedule.num_steps]
    dropouts = {0: None} | config.image.patch_dropouts
    for step, end in zip(steps, [*steps[1:], config.schedule.num_steps], strict=True):
        set_patch_dropout(planned.model, value_at(dropouts, step))
        layouts = planned.layouts[step]
        is_bf16 = config.engine.precision == "bf16"
        passes, found = measure_passes(planned, layouts, is_bf16=is_bf16, is_gpu=is_gpu)
        segments.append(SizesOfSegment(end - step, layouts, passes))
        used |= found
    for name, parameter in planned.model.named_parameters():
        if name.startswith("towers.") and name not in used:
            parameter.requires_grad_(False)
    parameters = list(planned.model.parameters())
    trained = [each for each in parameters if each.requires_grad]
    return ModelSizes(
        num_parameters=sum(each.numel() for each in parameters),
        num_trained=sum(each.numel() for each in trained),
        num_state_values=num_state_values(config.optimizer, trained),
        buffer_bytes=sum(each.numel() * each.element_size() for each in planned.model.buffers()),
        segments=segments,
    )
