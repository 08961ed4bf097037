"""Image and text backbones of open_clip's models."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from data_prep.errors import InputError
from pretrain.config import MediaKind, MediaTower, TextTower
from pretrain.model.tokenizer import Tokenizer

# open_clip's text transformer, with sizes from `options` instead of a named model.
FROM_SCRATCH_TEXT = "TextTransformer"


def build_open_clip_media(config: MediaTower, kind: MediaKind, assets: Path | None) -> nn.Module:
    """Builds the image tower of an open_clip model; see `build_media_backbone`."""
    if kind != "image":
        raise InputError("model.audio: open_clip has no audio towers; use timm or transformers")
    return _open_clip_model(config, assets).visual


def build_open_clip_text(config: TextTower, tokenizer: Tokenizer, assets: Path | None) -> nn.Module:
    """Builds the text tower of an open_clip model; see `build_text_backbone`."""
    if config.name != FROM_SCRATCH_TEXT:
        return _open_clip_model(config, assets).text
    from open_clip.transformer import TextTransformer

    sizes = {"vocab_size": tokenizer.vocab_size, "context_length": config.context_length}
    return TextTransformer(**(sizes | {"output_dim": None} | config.options))


def _open_clip_model(config: MediaTower | TextTower, assets: Path | None) -> nn.Module:
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
