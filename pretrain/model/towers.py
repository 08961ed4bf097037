"""Backbones from timm, open_clip and transformers.

A backbone takes the input of a tower (pixels, log-mel spectrogram or tokens) and returns [B, W].
Layers that would make a result depend on the number of processes or on the rest of the batch are
rejected (see docs/reproducibility.md).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.config import MediaKind, MediaTower, TextTower
from pretrain.model.drop_layers import check_rows_of_samples, refuse_other_randomness
from pretrain.model.sample_dropout import TowerDropKeys
from pretrain.model.tokenizer import Tokenizer

TowerConfig = MediaTower | TextTower
# open_clip's text transformer, with sizes from `options` instead of a named model.
FROM_SCRATCH_TEXT = "TextTransformer"


# --------------------------------------------------------------------------------------- timm


def _build_timm(config: MediaTower, kind: MediaKind, assets: Path | None) -> nn.Module:
    import timm

    weights: dict[str, Any] = {"pretrained": config.pretrained is True and assets is None}
    if isinstance(config.pretrained, str) and assets is None:
        weights["checkpoint_path"] = config.pretrained
    channels = 3 if kind == "image" else 1
    return timm.create_model(
        config.name, num_classes=0, in_chans=channels, **weights, **config.options
    )


# ----------------------------------------------------------------------------------- open_clip


def _build_open_clip_media(config: MediaTower, kind: MediaKind, assets: Path | None) -> nn.Module:
    if kind != "image":
        raise InputError("model.audio: open_clip has no audio towers; use timm or transformers")
    return _open_clip_model(config, assets).visual


def _build_open_clip_text(
    config: TextTower, tokenizer: Tokenizer, assets: Path | None
) -> nn.Module:
    if config.name != FROM_SCRATCH_TEXT:
        return _open_clip_model(config, assets).text
    from open_clip.transformer import TextTransformer

    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": config.context_length}
    return TextTransformer(**(sizes | {"output_dim": None} | config.options))


def _open_clip_model(config: TowerConfig, assets: Path | None) -> nn.Module:
    import open_clip

    if config.name not in open_clip.list_models():
        raise InputError(f"open_clip has no model {config.name!r}; see open_clip.list_models()")
    weights = config.pretrained if isinstance(config.pretrained, str) and not assets else None
    if config.pretrained is True:
        raise InputError(
            f"open_clip model {config.name}: pretrained: true does not name the weights; give a "
            f"tag ({', '.join(open_clip.list_pretrained_tags_by_model(config.name))}) or a file"
        )
    return open_clip.create_model(
        config.name, pretrained=weights, force_custom_text=True, **config.options
    )


# -------------------------------------------------------------------------------- transformers

# Model type of transformers -> its inputs from a log-mel spectrogram [B, 1, F, S].
_AUDIO_INPUTS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "audio-spectrogram-transformer": lambda mel: {"input_values": mel[:, 0].transpose(1, 2)},
    "clap_audio_model": lambda mel: {"input_features": mel.transpose(2, 3)},
}


class _TransformersMedia(nn.Module):
    """A transformers vision or audio model with pooled output [B, W]."""

    def __init__(self, backbone: nn.Module, kind: MediaKind) -> None:
        super().__init__()
        self.backbone = backbone
        self.kind = kind
        model_type = backbone.config.model_type
        if kind == "audio" and model_type not in _AUDIO_INPUTS:
            raise InputError(
                f"model.audio: expected a transformers model type that takes log-mel spectrograms "
                f"({', '.join(_AUDIO_INPUTS)}), found {model_type!r}"
            )

    def forward(self, pixels_or_mel: Tensor) -> Tensor:
        if self.kind == "image":
            inputs = {"pixel_values": pixels_or_mel}
        else:
            inputs = _AUDIO_INPUTS[self.backbone.config.model_type](pixels_or_mel)
        output = self.backbone(**inputs)
        pooled = getattr(output, "pooler_output", None)
        return output.last_hidden_state.mean(dim=1) if pooled is None else pooled


class TransformersText(nn.Module):
    """A transformers text model with pooled output [B, W]; padding is masked."""

    def __init__(self, backbone: nn.Module, *, pad_id: int, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pad_id = pad_id
        self.pooling = pooling

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != self.pad_id  # [B, L]
        hidden = self.backbone(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        if self.pooling == "first":
            return hidden[:, 0]  # [B, L, W] -> [B, W]
        weights = mask[..., None].to(hidden.dtype)
        num_tokens = weights.sum(dim=1).clamp(min=1)  # a caption may be all padding
        return (hidden * weights).sum(dim=1) / num_tokens  # [B, L, W] -> [B, W]


def _transformers_model(config: TowerConfig, assets: Path | None, kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    if assets is not None:
        return AutoModel.from_config(AutoConfig.from_pretrained(assets / f"{kind}_tower"))
    if config.pretrained:
        name = config.name if config.pretrained is True else config.pretrained
        return AutoModel.from_pretrained(name, **config.options)
    return AutoModel.from_config(AutoConfig.for_model(config.name, **config.options))


def _build_transformers_media(
    config: MediaTower, kind: MediaKind, assets: Path | None
) -> nn.Module:
    return _TransformersMedia(_transformers_model(config, assets, kind), kind)


def _build_transformers_text(
    config: TextTower, tokenizer: Tokenizer, assets: Path | None
) -> nn.Module:
    model = _transformers_model(config, assets, "text")
    return TransformersText(model, pad_id=tokenizer.pad_id, pooling=config.pooling)


# ------------------------------------------------------------------------------------ building

_MEDIA_BUILDERS = {
    "timm": _build_timm,
    "open_clip": _build_open_clip_media,
    "transformers": _build_transformers_media,
}
_TEXT_BUILDERS = {"open_clip": _build_open_clip_text, "transformers": _build_transformers_text}


def build_media_backbone(
    config: MediaTower, *, kind: MediaKind, assets: Path | None = None
) -> nn.Module:
    """Builds the encoder of one kind of media, without projection.

    Args:
        config: config section of the tower.
        kind: "image" (input [B, 3, H, Wd]) or "audio" (input [B, 1, F, S]).
        assets: folder of a checkpoint's assets; pretrained weights are then not loaded.

    Raises:
        InputError: if the library cannot build the encoder, or a trained encoder has batch norm.
    """
    return _build_backbone(
        lambda: _MEDIA_BUILDERS[config.library](config, kind, assets), f"model.{kind}", config
    )


def build_text_backbone(
    config: TextTower, *, tokenizer: Tokenizer, assets: Path | None = None
) -> nn.Module:
    """Builds the encoder of captions: int64 [B, L] -> [B, W], without projection.

    Args:
        config: config section of the tower.
        tokenizer: tokenizer of the captions.
        assets: folder of a checkpoint's assets; pretrained weights are then not loaded.

    Raises:
        InputError: if the library cannot build the encoder, or a trained encoder has batch norm.
    """
    return _build_backbone(
        lambda: _TEXT_BUILDERS[config.library](config, tokenizer, assets), "model.text", config
    )


def _build_backbone(build: Callable[[], nn.Module], where: str, config: TowerConfig) -> nn.Module:
    try:
        backbone = build()
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError, AssertionError, OSError) as error:
        raise InputError(
            f"{where}: {config.library} cannot build {config.name!r} with options "
            f"{config.options}: {error}"
        ) from error
    if config.frozen:
        backbone.requires_grad_(False)
    else:
        _refuse_batch_norm(backbone, where)
    return backbone


def _refuse_batch_norm(backbone: nn.Module, where: str) -> None:
    """Refuses batch norm: a rank's own statistics make the result depend on the number of ranks."""
    for name, module in backbone.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise InputError(
                f"{where}: layer {name} is a {type(module).__name__}, whose output depends on "
                "which samples share a process; choose a model without it, replace the norm "
                "(timm: options: {norm_layer: layernorm2d}), or freeze the tower (frozen: true)"
            )


def probe_backbone(
    backbone: nn.Module, examples: Tensor, *, where: str, drop_keys: TowerDropKeys | None = None
) -> int:
    """Determines the output width W of a backbone and freezes its unused parameters.

    Libraries build heads that pooled features never pass through, but engines wait for the gradient
    of every parameter that is not frozen.

    Args:
        backbone: backbone from `build_media_backbone` or `build_text_backbone`.
        examples: two different inputs.
        where: config key of the tower.
        drop_keys: keys of the dropout layers of a trained tower; None for a frozen tower.

    Raises:
        InputError: if the backbone does not accept the input, does not return [B, W], or has
            dropout that depends on the batch.
    """
    was_training = backbone.training
    try:
        if drop_keys is None:
            features = backbone.eval()(examples[:1])
        else:
            check_rows_of_samples(backbone.eval(), examples, where=where)
            features = _features_in_training(backbone.train(), examples[:1], drop_keys, where=where)
    except InputError:
        raise
    except (RuntimeError, ValueError, AssertionError, IndexError) as error:
        shape = list(examples[:1].shape)
        raise InputError(f"{where}: cannot encode input {shape}: {error}") from error
    if features.requires_grad:
        _freeze_unused(backbone, features)
    backbone.train(was_training)
    if features.ndim != 2:
        raise InputError(
            f"{where}: expected features [B, W] of input {list(examples[:1].shape)}, found "
            f"{list(features.shape)}"
        )
    return features.shape[-1]


def _freeze_unused(backbone: nn.Module, features: Tensor) -> None:
    features.sum().backward()
    unused = [p for p in backbone.parameters() if p.requires_grad and p.grad is None]
    for parameter in unused:
        parameter.requires_grad_(False)
    backbone.zero_grad()


def _features_in_training(
    backbone: nn.Module, example: Tensor, drop_keys: TowerDropKeys, *, where: str
) -> Tensor:
    """[1, W], encoded as in training; refuses layers that draw from a random generator."""
    keys = torch.zeros(1, dtype=torch.int64)
    with refuse_other_randomness(backbone, where=where), drop_keys.set_pairs(keys):
        return backbone(example)


def ends_in_joint_space(config: TowerConfig) -> bool:
    """Returns whether the backbone includes a projection, as open_clip's models do."""
    return config.library == "open_clip" and config.name != FROM_SCRATCH_TEXT


def save_tower_config(backbone: nn.Module, folder: Path, *, kind: str) -> None:
    """Writes the config of a transformers model, which rebuilding the tower needs."""
    if isinstance(backbone, _TransformersMedia | TransformersText):
        backbone.backbone.config.save_pretrained(str(folder / f"{kind}_tower"))
