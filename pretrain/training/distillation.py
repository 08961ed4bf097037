"""Distillation: the targets of the loss are mixed with the softmaxes of a frozen teacher.

The teacher encodes the same images, clips and tokens as the model in training (Yang et al. 2024,
"CLIP-KD"; Vasu et al. 2024, "MobileCLIP", equation 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from data_prep.config_file import read_stored_config
from data_prep.errors import InputError
from pretrain.checkpoint import find_checkpoint, load_model
from pretrain.checkpoints.record import read_record
from pretrain.config import (
    AudioTransform,
    ImageTransform,
    MediaKind,
    Pairing,
    PairingName,
    PretrainConfig,
    media_of_pairing,
)
from pretrain.distributed.collectives import on_main_process
from pretrain.loss.options import Teacher
from pretrain.model.contrastive_model import ContrastiveModel, EncoderInputs
from pretrain.model.tokenizer import Tokenizer
from pretrain.probe.towers import ProbeSettings, probe_model

SAMPLE_CAPTIONS = ("a photo of a dog", "It's 3 o'clock: rain, wind & a BELL.")


@dataclass(frozen=True)
class ModelInputs:
    """Config sections `image` and `audio`, which define the inputs of a model."""

    image: ImageTransform
    audio: AudioTransform

    def sizes(self, kind: MediaKind) -> dict[str, float]:
        """Returns {key: value} of the settings that determine the shape of an input."""
        if kind == "image":
            return {"size": self.image.size}
        return {
            "sample_rate_hz": self.audio.sample_rate_hz,
            "clip_seconds": self.audio.clip_seconds,
        }


@dataclass(frozen=True)
class PairingTeacher:
    """The teacher of one pairing."""

    pairing: PairingName
    model: ContrastiveModel
    weight: float  # weight of its softmaxes in the targets
    fingerprint: str  # SHA-256 of its files
    is_autocast: bool  # whether it computes in bf16, as the model in training does

    @torch.no_grad()
    def encode(self, micro_batches: Sequence[EncoderInputs]) -> Teacher:
        """Encodes this rank's pairs, without the masks of SpecAugment."""
        name, kind = self.pairing, media_of_pairing(self.pairing)
        inputs = [micro_batch[name] for micro_batch in micro_batches]
        with torch.autocast(inputs[0].tokens.device.type, torch.bfloat16, enabled=self.is_autocast):
            media = torch.cat([self.model.encode_media(kind, each.media) for each in inputs])
            text = torch.cat([self.model.encode_text(each.tokens) for each in inputs])
        scale = self.model.log_logit_scale[name].exp().item()
        return Teacher(media, text, scale, self.weight)


def load_teachers(
    pairings: Mapping[PairingName, Pairing],
    *,
    inputs: ModelInputs,
    tokenizer: Tokenizer,
    device: torch.device,
    is_autocast: bool,
) -> dict[PairingName, PairingTeacher]:
    """Loads the teachers of the pairings with distillation.

    Every rank must call it: the main process probes the teachers' towers.

    Args:
        pairings: section of each pairing.
        inputs: inputs of the model in training.
        tokenizer: tokenizer of the model in training.
        device: device of the teachers.
        is_autocast: whether the teachers compute in bf16.

    Raises:
        InputError: if a checkpoint is missing, its model expects different inputs, or a tower
            fails the probe.
    """
    teachers = {}
    for name, pairing in pairings.items():
        if pairing.teacher is not None:
            folder = find_checkpoint(pairing.teacher.checkpoint)
            _refuse_other_inputs(inputs, name, folder)
            model, _, teacher_tokenizer = load_model(folder, device=str(device))
            _refuse_other_tokens(name, folder, tokenizer, teacher_tokenizer)
            model.takes_trimmed_captions = on_main_process(
                partial(
                    probe_model,
                    model,
                    tokenizer=teacher_tokenizer,
                    image=inputs.image,
                    audio=inputs.audio,
                    settings=ProbeSettings(device, is_bf16=is_autocast),
                    where=f"pairings.{name}.teacher",
                    kinds=(media_of_pairing(name), "text"),
                )
            )
            teachers[name] = PairingTeacher(
                pairing=name,
                model=model,
                weight=pairing.teacher.weight,
                fingerprint=read_record(folder).model_sha256,
                is_autocast=is_autocast,
            )
    return teachers


def _refuse_other_inputs(inputs: ModelInputs, name: PairingName, folder: Path) -> None:
    config = read_stored_config(PretrainConfig, folder / "config.yaml")
    where = f"pairings.{name}.teacher.checkpoint={folder}"
    if name not in config.pairings:
        raise InputError(
            f"{where}: expected a model trained on {name}, found {', '.join(config.pairings)}"
        )
    kind = media_of_pairing(name)
    found = ModelInputs(config.image, config.audio).sizes(kind)
    for key, value in inputs.sizes(kind).items():
        if found[key] != value:
            raise InputError(
                f"{where}: the teacher was trained with {kind}.{key}={found[key]}, this run has "
                f"{value}; teacher and model read the same inputs: use the same value"
            )


def _refuse_other_tokens(
    name: PairingName, folder: Path, tokenizer: Tokenizer, teacher_tokenizer: Tokenizer
) -> None:
    own, found = (each(SAMPLE_CAPTIONS).tolist() for each in (tokenizer, teacher_tokenizer))
    if own != found:
        raise InputError(
            f"pairings.{name}.teacher.checkpoint={folder}: the teacher was trained with other "
            f"tokens: its tokens of {SAMPLE_CAPTIONS[0]!r} are {found[0][:8]} ({len(found[0])} in "
            f"total), those of this run {own[0][:8]} ({len(own[0])} in total); use the teacher's "
            "model.text.tokenizer and context_length"
        )
