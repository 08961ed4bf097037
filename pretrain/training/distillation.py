"""Distillation: the targets of the loss are mixed with the softmaxes of a frozen teacher.

The teacher encodes the same images, clips and tokens as the model in training (Yang et al. 2024,
"CLIP-KD"; Vasu et al. 2024, "MobileCLIP", equation 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from data_prep.config_file import read_stored_config
from data_prep.errors import InputError
from pretrain.checkpoint import find_checkpoint, load_model
from pretrain.checkpoints.record import read_record
from pretrain.config import PretrainConfig
from pretrain.distributed.collectives import on_main_process
from pretrain.loss.options import Teacher
from pretrain.model.contrastive_model import ContrastiveModel, EncoderInputs, StreamInputs
from pretrain.model.tokenizer import Tokenizer
from pretrain.probe.towers import ProbeSettings, probe_model
from pretrain.settings.data import Stream, StreamName
from pretrain.settings.model import Model, VectorModality
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.settings.views import View

SAMPLE_CAPTIONS = ("a photo of a dog", "It's 3 o'clock: rain, wind & a BELL.")


Shape = tuple[str, int | None, int | None]  # kind; width and max_rows of vectors


def shape_of(model: Model, modality: str) -> Shape:
    """Returns what two models must have in common to read the same inputs of a modality."""
    section = model.modalities.get(modality)
    if isinstance(section, VectorModality):
        return ("vector", section.width, section.max_rows)
    return (model.kinds[modality], None, None)


@dataclass(frozen=True)
class ModelInputs:
    """Config sections `image` and `audio`, which define the inputs of a model."""

    image: ImageTransform
    audio: AudioTransform
    shapes: Mapping[str, Shape] = field(default_factory=dict)  # of each modality, by `shape_of`

    def sizes(self, kind: str) -> dict[str, float]:
        """Returns {key: value} of the settings that determine the shape of a kind's inputs."""
        if kind == "image":
            return {"size": self.image.size}
        if kind == "audio":
            return {
                "sample_rate_hz": self.audio.sample_rate_hz,
                "clip_seconds": self.audio.clip_seconds,
            }
        return {}  # tokens are compared, and the config sets the width of vectors


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

    @torch.no_grad()
    def encode(self, micro_batches: Sequence[EncoderInputs]) -> Teacher:
        """Encodes this rank's samples, without the masks of SpecAugment."""
        inputs = [self._without_randomness(each[self.stream]) for each in micro_batches]
        device = inputs[0].views[self.views[0]][0].device
        with torch.autocast(device.type, torch.bfloat16, enabled=self.is_autocast):
            left, right = (
                torch.cat([self.model.encode_view("", view, each)[view] for each in inputs])
                for view in self.views
            )
        scale = self.model.log_logit_scale[self.temperature].exp().item()
        return Teacher(left, right, scale, self.weight)

    def _without_randomness(self, inputs: StreamInputs) -> StreamInputs:
        """The inputs without dropout and without the masks of SpecAugment."""
        kinds = {view: self.model.kinds[View.parse(view).modality] for view in self.views}
        views = {
            view: inputs.views[view][:1] if kind == "audio" else inputs.views[view]
            for view, kind in kinds.items()
        }
        return inputs._replace(views=views, drop_keys=None)


def load_teachers(
    streams: Mapping[StreamName, Stream],
    *,
    inputs: ModelInputs,
    tokenizer: Tokenizer | None,
    device: torch.device,
    is_autocast: bool,
) -> dict[str, ObjectiveTeacher]:
    """Loads the teachers of the objectives with distillation, by "<stream>/<objective>".

    Every rank must call it: the main process probes the teachers' towers.

    Args:
        streams: section of each stream.
        inputs: inputs of the model in training.
        tokenizer: tokenizer of the model in training.
        device: device of the teachers.
        is_autocast: whether the teachers compute in bf16.

    Raises:
        InputError: if a checkpoint is missing, its model expects different inputs, or a tower
            fails the probe.
    """
    teachers = {}
    for stream_name, stream in streams.items():
        for name, objective in stream.objectives.items():
            teacher = getattr(objective, "teacher", None)
            if teacher is None:
                continue
            folder = find_checkpoint(teacher.checkpoint)
            where = f"streams.{stream_name}.objectives.{name}.teacher.checkpoint={folder}"
            views = objective.views(name)
            temperature = objective.temperature_name(name)
            _refuse_other_inputs(inputs, folder, where, views=views, temperature=temperature)
            model, _, teacher_tokenizer = load_model(folder, device=str(device))
            if any(model.kinds[View.parse(view).modality] == "text" for view in views):
                _refuse_other_tokens(where, tokenizer, teacher_tokenizer)
            trims = on_main_process(
                partial(
                    probe_model,
                    model,
                    tokenizer=teacher_tokenizer,
                    image=inputs.image,
                    audio=inputs.audio,
                    settings=ProbeSettings(device, is_bf16=is_autocast),
                    where=where,
                    names=[model.tower_names[View.parse(view).modality] for view in views],
                )
            )
            model.takes_trimmed_captions = trims and not _has_other_texts(model, views)
            teachers[f"{stream_name}/{name}"] = ObjectiveTeacher(
                stream=stream_name,
                views=views,
                temperature=temperature,
                model=model,
                weight=teacher.weight,
                fingerprint=read_record(folder).model_sha256,
                is_autocast=is_autocast,
            )
    return teachers


def _refuse_other_inputs(
    inputs: ModelInputs, folder: Path, where: str, *, views: Sequence[str], temperature: str
) -> None:
    config = read_stored_config(PretrainConfig, folder / "config.yaml")
    if temperature not in config.temperatures:
        raise InputError(
            f"{where}: expected a model with the temperature {temperature!r}, found "
            f"{', '.join(config.temperatures)}"
        )
    found = ModelInputs(config.image, config.audio)
    for modality in dict.fromkeys(View.parse(view).modality for view in views):
        kind = config.model.kinds.get(modality)
        if kind is None:
            raise InputError(f"{where}: expected a model with a tower for {modality}, found none")
        shape = shape_of(config.model, modality)
        if (own := inputs.shapes.get(modality, shape)) != shape:
            raise InputError(
                f"{where}: the teacher's {modality} is of {shape}, this run's of {own} (kind, and "
                "width and max_rows of vectors); teacher and model read the same inputs"
            )
        for key, value in inputs.sizes(kind).items():
            if found.sizes(kind)[key] != value:
                raise InputError(
                    f"{where}: the teacher was trained with {kind}.{key}={found.sizes(kind)[key]}, "
                    f"this run has {value}; teacher and model read the same inputs: use the same "
                    "value"
                )


def _has_other_texts(model: ContrastiveModel, views: Sequence[str]) -> bool:
    """Whether a text of some views is encoded by another tower than `text`."""
    modalities = {View.parse(view).modality for view in views}
    texts = [each for each in modalities if model.kinds[each] == "text"]
    return any(model.tower_names[each] != "text" for each in texts)


def _refuse_other_tokens(where: str, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> None:
    own, found = (each(SAMPLE_CAPTIONS).tolist() for each in (tokenizer, teacher_tokenizer))
    if own != found:
        raise InputError(
            f"{where}: the teacher was trained with other "
            f"tokens: its tokens of {SAMPLE_CAPTIONS[0]!r} are {found[0][:8]} ({len(found[0])} in "
            f"total), those of this run {own[0][:8]} ({len(own[0])} in total); use the teacher's "
            "model.text.tokenizer and context_length"
        )
