"""The contrastive model: one tower per modality, one joint space, one temperature per pairing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_prep.errors import InputError
from pretrain.config import ImageTransform, MediaKind, PairingName, PretrainConfig, media_of_pairing
from pretrain.model.caption_trimming import accept_trimmed_captions, takes_trimmed_captions
from pretrain.model.drop_layers import replace_drop_layers
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.model.sample_dropout import Draws, TowerDraws, pair_keys
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import (
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
    stripes: Tensor | None = None  # [B, stripes, 2] of SpecAugment (see pretrain.model.log_mel)
    draws: Draws | None = None  # in training: the pairs that layers that drop draw for


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
    """Input stage, backbone and projection into the joint space: [B, ...] -> [B, D].

    Args:
        input_stage: from the batch's tensors to the backbone's input.
        backbone: as pretrain.model.towers builds it.
        projection: from W to D.
        draws: what the backbone's layers that drop draw from.
    """

    def __init__(
        self,
        input_stage: nn.Module,
        backbone: nn.Module,
        projection: nn.Module,
        *,
        draws: TowerDraws,
    ) -> None:
        super().__init__()
        self.draws = draws
        self.input_stage = input_stage
        self.backbone = backbone
        self.projection = projection
        self.is_frozen = not any(p.requires_grad for p in backbone.parameters())

    def forward(self, *inputs: Tensor, keys: Tensor | None = None) -> Tensor:
        """[B, ...] -> [B, D]; keys: int64 [B] of the pairs, if layers drop (see sample_dropout)."""
        with self.draws.of_pairs(keys):
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
        seed: of what is dropped in training.
        takes_trimmed_captions: whether tokens may be cut to the longest caption of a batch without
            changing any embedding.
    """

    def __init__(
        self,
        towers: Mapping[str, Tower],
        *,
        pairings: list[PairingName],
        initial_scale: float,
        seed: int,
        initial_biases: Mapping[PairingName, float] | None = None,
        takes_trimmed_captions: bool = False,
    ) -> None:
        super().__init__()
        self.seed = seed
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
        self, micro_batches: Sequence[EncoderInputs], *, on_media: OnMedia | None = None
    ) -> dict[PairingName, PairingFeatures]:
        """Features of every pairing in the step; B may differ between pairings.

        Args:
            micro_batches: micro-batches, encoded one after the other; their features are joined.
            on_media: told a pairing's media features before its captions are encoded.
        """
        return {
            name: self._encode_pairing(name, micro_batches, on_media) for name in micro_batches[0]
        }

    def _encode_pairing(
        self, name: PairingName, micro_batches: Sequence[EncoderInputs], on_media: OnMedia | None
    ) -> PairingFeatures:
        kind, inputs = media_of_pairing(name), [micro_batch[name] for micro_batch in micro_batches]
        keys = [
            None if each.draws is None else pair_keys(each.draws, seed=self.seed, pairing=name)
            for each in inputs
        ]
        pairs = list(zip(inputs, keys, strict=True))
        media = torch.cat([self.encode_media(kind, x.media, x.stripes, keys=k) for x, k in pairs])
        if on_media is not None:
            on_media(name, media)
        text = torch.cat([self.encode_text(x.tokens, keys=k) for x, k in pairs])
        bias = self.logit_bias[name].clone() if name in self.logit_bias else None
        return PairingFeatures(media, text, self.log_logit_scale[name].exp(), bias)

    def encode_media(
        self,
        kind: MediaKind,
        media: Tensor,
        stripes: Tensor | None = None,
        *,
        keys: Tensor | None = None,
    ) -> Tensor:
        """[B, D] L2-normalised embeddings of images or clips (in training perhaps with stripes, and
        with keys int64 [B] of what layers drop)."""
        inputs = (media,) if stripes is None else (media, stripes)
        return _encode(self.towers[kind], *inputs, keys=keys)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, Wd] -> [B, D] L2-normalised."""
        return self.encode_media("image", pixels)

    def encode_audio(self, waveforms: Tensor) -> Tensor:
        """float32 [B, samples] -> [B, D] L2-normalised."""
        return self.encode_media("audio", waveforms)

    def encode_text(self, tokens: Tensor, *, keys: Tensor | None = None) -> Tensor:
        """int64 [B, L] -> [B, D] L2-normalised; keys as above."""
        return _encode(self.towers["text"], tokens, keys=keys)

    def save_assets(self, folder: Path) -> None:
        """Writes what rebuilding the towers needs besides config and weights."""
        for kind, tower in self.towers.items():
            save_tower_config(tower.backbone, folder, kind=kind)


def _encode(tower: Tower, *inputs: Tensor, keys: Tensor | None) -> Tensor:
    """[B, D] L2-normalised, also where B is 0: many backbones cannot encode an empty batch, so they
    are given one row that is taken away again. Its parameters then have a gradient, of zero."""
    num_rows = len(inputs[0])
    if num_rows == 0:
        inputs = tuple(each.new_ones(1, *each.shape[1:]) for each in inputs)
        keys = None if keys is None else keys.new_ones(1)
    return functional.normalize(tower(*inputs, keys=keys).float(), dim=-1)[:num_rows]


def build_model(
    config: PretrainConfig, *, tokenizer: Tokenizer, assets: Path | None = None
) -> ContrastiveModel:
    """The model a config describes, initialised from its seed or its pretrained towers.

    Args:
        config: the whole config.
        tokenizer: of the text tower.
        assets: a checkpoint's folder of files; pretrained weights are then left to the checkpoint.

    Raises:
        InputError: a tower cannot be built or breaks a law (see pretrain.model.towers).
    """
    torch.manual_seed(config.seed)
    towers: dict[str, Tower] = {}
    if config.model.image is not None:
        pixels = _two_examples(3, config.image.size, config.image.size).to(torch.uint8)
        normalize = NormalizedPixels(config.image)
        towers["image"] = _media_tower(config, "image", normalize, pixels, assets)
    if config.model.audio is not None:
        num_samples = round(config.audio.clip_seconds * config.audio.sample_rate_hz)
        waveforms = _two_examples(num_samples) / 256
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
        seed=config.seed,
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
    examples: Tensor,
    assets: Path | None,
) -> Tower:
    backbone = build_media_backbone(getattr(config.model, kind), kind=kind, assets=assets)
    return _probed_tower(config, kind, input_stage, backbone, input_stage(examples))


def _text_tower(config: PretrainConfig, tokenizer: Tokenizer, assets: Path | None) -> Tower:
    backbone = build_text_backbone(config.model.text, tokenizer=tokenizer, assets=assets)
    examples = tokenizer(["a caption", "one more"])
    return _probed_tower(config, "text", nn.Identity(), backbone, examples)


def _probed_tower(
    config: PretrainConfig, kind: str, input_stage: nn.Module, backbone: nn.Module, inputs: Tensor
) -> Tower:
    """The tower of a backbone that was shown two inputs."""
    is_frozen = getattr(config.model, kind).frozen
    draws = TowerDraws() if is_frozen else replace_drop_layers(backbone, kind=kind)
    width = probe_backbone(
        backbone, inputs, where=f"model.{kind}", draws=None if is_frozen else draws
    )
    return Tower(input_stage, backbone, _projection(config, kind, width), draws=draws)


def _two_examples(*shape: int) -> Tensor:
    """int64 [2, *shape] of numbers from 0 to 255, which are not alike."""
    places = torch.arange(math.prod(shape))
    return torch.stack([places * 7 % 251, places * 11 % 256]).view(2, *shape)


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
