"""The contrastive model: one tower per modality, one joint space, one temperature per pairing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from data_prep.errors import InputError
from pretrain.config import (
    AudioTransform,
    ImageTransform,
    MediaKind,
    Model,
    Pairing,
    PairingName,
    media_of_pairing,
)
from pretrain.model.caption_trimming import accept_trimmed_captions, takes_trimmed_captions
from pretrain.model.drop_layers import replace_drop_layers
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.model.sample_dropout import Draws, TowerDraws, pair_keys
from pretrain.model.tokenizer import Tokenizer
from pretrain.model.towers import (
    TowerConfig,
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
    config: Model,
    *,
    image: ImageTransform,
    audio: AudioTransform,
    pairings: Mapping[PairingName, Pairing],
    seed: int,
    tokenizer: Tokenizer,
    assets: Path | None = None,
) -> ContrastiveModel:
    """Builds a model whose weights are initialised from a seed or from pretrained towers.

    Args:
        config: config section `model`.
        image: config section `image`, which gives the size and normalisation of images.
        audio: config section `audio`, which gives the length and spectrogram of clips.
        pairings: config sections `pairings`; each has a logit scale, and a bias if its loss is
            sigmoid.
        seed: seed of the weights and of what layers drop in training.
        tokenizer: tokenizer of the text tower.
        assets: folder of a checkpoint's assets; pretrained weights are then not loaded.

    Raises:
        InputError: if a tower cannot be built or breaks a law (see pretrain.model.towers).
    """
    torch.manual_seed(seed)
    build = partial(_build_tower, embed_dim=config.embed_dim)
    towers: dict[str, Tower] = {}
    if config.image is not None:
        pixels = _two_examples(3, image.size, image.size).to(torch.uint8)
        normalize = NormalizedPixels(image)
        backbone = build_media_backbone(config.image, kind="image", assets=assets)
        towers["image"] = build(config.image, "image", normalize, backbone, normalize(pixels))
    if config.audio is not None:
        waveforms = _two_examples(round(audio.clip_seconds * audio.sample_rate_hz)) / 256
        log_mel = LogMelSpectrogram(audio)
        backbone = build_media_backbone(config.audio, kind="audio", assets=assets)
        towers["audio"] = build(config.audio, "audio", log_mel, backbone, log_mel(waveforms))
    backbone = build_text_backbone(config.text, tokenizer=tokenizer, assets=assets)
    tokens = tokenizer(["a caption", "one more"])
    towers["text"] = build(config.text, "text", nn.Identity(), backbone, tokens)
    takes_trimmed = takes_trimmed_captions(towers["text"].backbone, tokenizer)
    if takes_trimmed:
        accept_trimmed_captions(towers["text"].backbone)
    return ContrastiveModel(
        towers,
        pairings=list(pairings),
        initial_scale=config.logit_scale.initial,
        seed=seed,
        initial_biases={
            name: config.initial_logit_bias
            for name, pairing in pairings.items()
            if pairing.loss == "sigmoid"
        },
        takes_trimmed_captions=takes_trimmed,
    )


def _build_tower(
    config: TowerConfig,
    kind: str,
    input_stage: nn.Module,
    backbone: nn.Module,
    examples: Tensor,
    *,
    embed_dim: int,
) -> Tower:
    """Completes a tower around a backbone, which is probed with two inputs."""
    draws = TowerDraws() if config.frozen else replace_drop_layers(backbone, kind=kind)
    width = probe_backbone(
        backbone, examples, where=f"model.{kind}", draws=None if config.frozen else draws
    )
    projection = _projection(config, kind, width, embed_dim)
    return Tower(input_stage, backbone, projection, draws=draws)


def _two_examples(*shape: int) -> Tensor:
    """int64 [2, *shape] of numbers from 0 to 255, which are not alike."""
    places = torch.arange(math.prod(shape))
    return torch.stack([places * 7 % 251, places * 11 % 256]).view(2, *shape)


def _projection(config: TowerConfig, kind: str, width: int, embed_dim: int) -> nn.Module:
    """The projection from W to D; backbones with a projection of their own need none."""
    if ends_in_joint_space(config):
        if width != embed_dim:
            raise InputError(
                f"model.embed_dim={embed_dim}: {config.library}'s {config.name} (model.{kind}) "
                f"ends in a joint space of {width}; set embed_dim to {width}"
            )
        return nn.Identity()
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection
