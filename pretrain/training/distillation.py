"""Distillation: the targets of the loss are mixed with the softmaxes of a frozen teacher.

The teacher encodes the same images, clips and texts as the model in training, prepared as its own
weights were trained (Yang et al. 2024, "CLIP-KD"; Vasu et al. 2024, "MobileCLIP", equation 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pretrain.data.view_formats import ViewFormat
from pretrain.distributed.collectives import on_main_process
from pretrain.loss.options import Teacher
from pretrain.model.contrastive_model import ContrastiveModel, EncoderInputs, StreamInputs
from pretrain.probe.towers import ProbeSettings, probe_model
from pretrain.settings.data import Stream, StreamName
from pretrain.settings.views import View, view_of_teacher
from pretrain.teachers.loaded_teacher import load_teacher
from pretrain.teachers.teacher_inputs import ModelInputs, teacher_formats


@dataclass(frozen=True)
class ObjectiveTeacher:
    """The teacher of one contrastive objective."""

    stream: StreamName
    views: tuple[str, str]  # left, right
    temperature: str
    model: ContrastiveModel
    weight: float  # weight of its softmaxes in the targets
    fingerprint: str  # SHA-256 of its files
    is_autocast: bool  # whether it computes in bf16, as the model in training does
    # view -> format of the content that it reads in another form than the model in training
    formats: Mapping[str, ViewFormat] = field(default_factory=dict)
    objective: str = ""

    def input_of(self, view: str) -> str:
        """Returns the name of the view of a batch that it reads as one of its views."""
        return view_of_teacher(view, self.objective) if view in self.formats else view

    @torch.no_grad()
    def encode(self, micro_batches: Sequence[EncoderInputs]) -> Teacher:
        """Encodes this rank's samples, without the masks of SpecAugment."""
        inputs = [self._own_inputs(each[self.stream]) for each in micro_batches]
        device = inputs[0].views[self.views[0]][0].device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.is_autocast):
            left, right = (
                torch.cat([self.model.encode_view("", view, each)[view] for each in inputs])
                for view in self.views
            )
        scale = self.model.log_logit_scale[self.temperature].exp().item()
        return Teacher(left, right, scale, self.weight)

    def _own_inputs(self, inputs: StreamInputs) -> StreamInputs:
        """Its views, without dropout and without the masks of SpecAugment."""
        views, present = {}, {}
        for view in self.views:
            read = self.input_of(view)
            is_audio = self.model.kinds[View.parse(view).modality] == "audio"
            views[view] = inputs.views[read][:1] if is_audio else inputs.views[read]
            if read in inputs.present:
                present[view] = inputs.present[read]
        return StreamInputs(views, drop_keys=None, present=present)


def load_teachers(
    streams: Mapping[StreamName, Stream],
    *,
    inputs: ModelInputs,
    device: torch.device,
    is_autocast: bool,
) -> dict[str, ObjectiveTeacher]:
    """Loads the teachers of the objectives with distillation, by "<stream>/<objective>".

    Every rank must call it: the main process probes the teachers' towers.

    Args:
        streams: section of each stream.
        inputs: inputs of the model in training.
        device: device of the teachers.
        is_autocast: whether the teachers compute in bf16.

    Raises:
        InputError: if a teacher is missing or damaged, cannot read what the model in training
            reads, or fails the probe.
    """
    settings = ProbeSettings(device, is_bf16=is_autocast)
    return {
        f"{stream_name}/{name}": _load(stream_name, name, objective, inputs, settings)
        for stream_name, stream in streams.items()
        for name, objective in stream.objectives.items()
        if getattr(objective, "teacher", None) is not None
    }


def _load(
    stream: StreamName, name: str, objective: Any, inputs: ModelInputs, settings: ProbeSettings
) -> ObjectiveTeacher:
    where = f"streams.{stream}.objectives.{name}.teacher.checkpoint"
    location, views = objective.teacher.checkpoint, objective.views(name)
    temperature = objective.temperature_name(name)
    modalities = [View.parse(view).modality for view in views]
    loaded = load_teacher(
        location,
        where=where,
        temperature=temperature,
        modalities=modalities,
        device=settings.device,
    )
    model, where = loaded.model, f"{where}={location}"
    kinds = {view: inputs.shapes[View.parse(view).modality][0] for view in views}
    formats = teacher_formats(kinds, inputs, loaded.inputs, where=where)
    trims = on_main_process(
        partial(
            probe_model,
            model,
            tokenizer=loaded.inputs.tokenizer,
            image=loaded.inputs.image,
            audio=loaded.inputs.audio,
            settings=settings,
            where=where,
            names=[model.tower_names[each] for each in modalities],
        )
    )
    model.takes_trimmed_captions = trims and not _has_other_texts(model, views)
    return ObjectiveTeacher(
        stream=stream,
        views=views,
        temperature=temperature,
        model=model,
        weight=objective.teacher.weight,
        fingerprint=loaded.fingerprint,
        is_autocast=settings.is_bf16,
        formats=formats,
        objective=name,
    )


def formats_of_teachers(
    teachers: Mapping[str, ObjectiveTeacher],
) -> dict[StreamName, dict[str, tuple[str, ViewFormat]]]:
    """Returns stream -> {name in a batch: (view whose content it shows, its format)}."""
    found: dict[StreamName, dict[str, tuple[str, ViewFormat]]] = {}
    for teacher in teachers.values():
        of_stream = found.setdefault(teacher.stream, {})
        of_stream |= {
            teacher.input_of(view): (view, form) for view, form in teacher.formats.items()
        }
    return found


def _has_other_texts(model: ContrastiveModel, views: Sequence[str]) -> bool:
    """Whether a text of some views is encoded by another tower than `text`."""
    modalities = {View.parse(view).modality for view in views}
    texts = [each for each in modalities if model.kinds[each] == "text"]
    return any(model.tower_names[each] != "text" for each in texts)
