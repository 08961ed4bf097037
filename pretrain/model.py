"""The contrastive model: one tower per modality, one joint space, one temperature per pairing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_prep.config_file import InputError
from pretrain.caption_trimming import accept_trimmed_captions, takes_trimmed_captions
from pretrain.config import ImageTransform, MediaKind, PairingName, PretrainConfig, media_of_pairing
from pretrain.log_mel import LogMelSpectrogram
from pretrain.tokenizer import Tokenizer
from pretrain.towers import (
    build_media_backbone,
    build_text_backbone,
    ends_in_joint_space,
    probe_backbone,
    save_tower_config,
)


class PairingFeatures(NamedTuple):
    """What a pairing's loss is taken of."""

    media: Tensor  # [B, D], L2-normalised
    text: Tensor  # [B, D], L2-normalised
    scale: Tensor  # [1], inverse temperature
    bias: Tensor | None = None  # [1], of the sigmoid loss


class PairInputs(NamedTuple):
    """What the towers are given of one pairing's pairs; B may be 0."""

    media: Tensor  # uint8 [B, 3, H, Wd] or float32 [B, samples]
    tokens: Tensor  # int64 [B, L]
    stripes: Tensor | None = None  # [B, stripes, 2] of SpecAugment (see pretrain.log_mel)


EncoderInputs = Mapping[PairingName, PairInputs]
OnMedia = Callable[[PairingName, Tensor], None]


class NormalizedPixels(nn.Module):
    """uint8 [B, 3, H, Wd] -> float32, in units of the mean and deviation the tower expects."""

    def __init__(self, config: ImageTransform) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std


class Tower(nn.Module):
    """Input stage, backbone and projection into the joint space: [B, ...] -> [B, D]."""

    def __init__(self, input_stage: nn.Module, backbone: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.input_stage = input_stage
        self.backbone = backbone
        self.projection = projection
        self.is_frozen = not any(p.requires_grad for p in backbone.parameters())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.projection(self.backbone(self.input_stage(*inputs)))  # [B, W] -> [B, D]

    def train(self, mode: bool = True) -> Tower:
        """A frozen backbone stays in evaluation mode, so that its statistics never move."""
        super().train(mode)
        if self.is_frozen:
            self.backbone.eval()
        return self


class ContrastiveModel(nn.Module):
    """Encodes media and captions into one space.

    `forward` is for training; outside of it use `encode_image`, `encode_audio`, `encode_text`.

    Attributes:
        takes_trimmed_captions: whether tokens may be cut to the longest caption of a batch without
            changing any embedding.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        *,
        pairings: list[PairingName],
        initial_scale: float,
        initial_biases: Mapping[PairingName, float] | None = None,
        takes_trimmed_captions: bool = False,
    ) -> None:
        super().__init__()
        self.takes_trimmed_captions = takes_trimmed_captions
        self.towers = nn.ModuleDict(towers)
        # Of shape (1,): engines that flatten parameters cannot take a scalar.
        initial = torch.full((1,), math.log(initial_scale))
        self.log_logit_scale = nn.ParameterDict(
            {name: nn.Parameter(initial.clone()) for name in pairings}
        )
        self.logit_bias = nn.ParameterDict(
            {
                name: nn.Parameter(torch.full((1,), bias))
                for name, bias in (initial_biases or {}).items()
            }
        )

    def forward(
        self, pieces: Sequence[EncoderInputs], *, on_media: OnMedia | None = None
    ) -> dict[PairingName, PairingFeatures]:
        """Features of every pairing in the step; B may differ between pairings.

        Args:
            pieces: micro-batches, encoded one after the other; their features are joined.
            on_media: told a pairing's media features before its captions are encoded.
        """
        return {name: self._encode_pairing(name, pieces, on_media) for name in pieces[0]}

    def _encode_pairing(
        self, name: PairingName, pieces: Sequence[EncoderInputs], on_media: OnMedia | None
    ) -> PairingFeatures:
        kind = media_of_pairing(name)
        media = torch.cat(
            [self.encode_media(kind, each[name].media, each[name].stripes) for each in pieces]
        )
        if on_media is not None:
            on_media(name, media)
        text = torch.cat([self.encode_text(each[name].tokens) for each in pieces])
        bias = self.logit_bias[name].clone() if name in self.logit_bias else None
        return PairingFeatures(media, text, self.log_logit_scale[name].exp(), bias)

    def encode_media(self, kind: MediaKind, media: Tensor, stripes: Tensor | None = None) -> Tensor:
        """[B, D] L2-normalised embeddings of images or clips (in training perhaps with stripes)."""
        inputs = (media,) if stripes is None else (media, stripes)
        return _encode(self.towers[kind], *inputs)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, Wd] -> [B, D] L2-normalised."""
        return self.encode_media("image", pixels)

    def encode_audio(self, waveforms: Tensor) -> Tensor:
        """float32 [B, samples] -> [B, D] L2-normalised."""
        return self.encode_media("audio", waveforms)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """int64 [B, L] -> [B, D] L2-normalised."""
        return _encode(self.towers["text"], tokens)

    def save_assets(self, folder: Path) -> None:
        """Writes what rebuilding the towers needs besides config and weights."""
        for kind, tower in self.towers.items():
            save_tower_config(tower.backbone, folder, kind=kind)


def _encode(tower: Tower, *inputs: Tensor) -> Tensor:
    """[B, D] L2-normalised, also where B is 0: many backbones cannot encode an empty batch, so they
    are given one row that is taken away again. Its parameters then have a gradient, of zero."""
    num_rows = len(inputs[0])
    if num_rows == 0:
        inputs = tuple(each.new_ones(1, *each.shape[1:]) for each in inputs)
    return functional.normalize(tower(*inputs).float(), dim=-1)[:num_rows]


def build_model(
    config: PretrainConfig, *, tokenizer: Tokenizer, assets: Path | None = None
) -> ContrastiveModel:
    """The model a config describes, initialised from its seed or its pretrained towers.

    Args:
        config: the whole config.
        tokenizer: of the text tower.
        assets: a checkpoint's folder of files; pretrained weights are then left to the checkpoint.

    Raises:
        InputError: a tower cannot be built or breaks a law (see pretrain.towers).
    """
    torch.manual_seed(config.seed)
    towers: dict[str, Tower] = {}
    if config.model.image is not None:
        pixels = torch.zeros(1, 3, config.image.size, config.image.size, dtype=torch.uint8)
        normalize = NormalizedPixels(config.image)
        towers["image"] = _media_tower(config, "image", normalize, pixels, assets)
    if config.model.audio is not None:
        num_samples = round(config.audio.clip_seconds * config.audio.sample_rate_hz)
        waveforms = torch.zeros(1, num_samples)
        log_mel = LogMelSpectrogram(config.audio)
        towers["audio"] = _media_tower(config, "audio", log_mel, waveforms, assets)
    towers["text"] = _text_tower(config, tokenizer, assets)
    takes_trimmed = takes_trimmed_captions(towers["text"].backbone, tokenizer)
    if takes_trimmed:
        accept_trimmed_captions(towers["text"].backbone)
    return ContrastiveModel(
        towers,
        pairings=list(config.pairings),
        initial_scale=config.model.logit_scale.initial,
        initial_biases={
            name: config.model.initial_logit_bias
            for name, pairing in config.pairings.items()
            if pairing.loss == "sigmoid"
        },
        takes_trimmed_captions=takes_trimmed,
    )


def _media_tower(
    config: PretrainConfig,
    kind: MediaKind,
    input_stage: nn.Module,
    example: Tensor,
    assets: Path | None,
) -> Tower:
    backbone = build_media_backbone(getattr(config.model, kind), kind=kind, assets=assets)
    width = probe_backbone(backbone, input_stage(example), where=f"model.{kind}")
    return Tower(input_stage, backbone, _projection(config, kind, width))


def _text_tower(config: PretrainConfig, tokenizer: Tokenizer, assets: Path | None) -> Tower:
    backbone = build_text_backbone(config.model.text, tokenizer=tokenizer, assets=assets)
    width = probe_backbone(backbone, tokenizer(["a caption"]), where="model.text")
    return Tower(nn.Identity(), backbone, _projection(config, "text", width))


def _projection(config: PretrainConfig, kind: str, width: int) -> nn.Module:
    """The way from W to D; towers that end in their own joint space keep it."""
    tower, embed_dim = getattr(config.model, kind), config.model.embed_dim
    if ends_in_joint_space(tower):
        if width != embed_dim:
            raise InputError(
                f"model.embed_dim={embed_dim}: {tower.library}'s {tower.name} (model.{kind}) ends "
                f"in a joint space of {width}; set embed_dim to {width}"
            )
        return nn.Identity()
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection
