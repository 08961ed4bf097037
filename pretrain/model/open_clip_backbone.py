"""Image and text backbones of open_clip's models; only the half that a tower needs is built."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn

from data_prep.errors import InputError
from pretrain.model.tokenizer import Tokenizer
from pretrain.settings.model import MediaKind, MediaTower, TextTower

# open_clip's text transformer, with sizes from `options` instead of a named model.
FROM_SCRATCH_TEXT = "TextTransformer"
# Options of open_clip's create_model -> (section of the model's config, key).
_FORCED_OPTIONS = {
    "force_quick_gelu": (None, "quick_gelu"),
    "force_image_size": ("vision_cfg", "image_size"),
    "force_patch_dropout": ("vision_cfg", "patch_dropout"),
    "force_context_length": ("text_cfg", "context_length"),
}


def build_open_clip_media(
    config: MediaTower,
    kind: MediaKind,
    saved: Path | None,
    input_shape: tuple[int, int] | None = None,
) -> nn.Module:
    """Builds the image tower of an open_clip model; see `build_media_backbone`."""
    if kind != "image":
        raise InputError("model.audio: open_clip has no audio towers; use timm or transformers")
    options = dict(config.options)
    if input_shape is not None:
        options.setdefault("force_image_size", input_shape[0])
    if _pretrained(config, saved) is not None:
        return _returns_one_tensor(_whole_model(config, options).visual)
    from open_clip.model import _build_vision_tower

    sizes = _model_config(config.name, options)
    return _returns_one_tensor(
        _build_vision_tower(sizes["embed_dim"], sizes["vision_cfg"], sizes.get("quick_gelu", False))
    )


def build_open_clip_text(config: TextTower, tokenizer: Tokenizer, saved: Path | None) -> nn.Module:
    """Builds the text tower of an open_clip model; see `build_text_backbone`."""
    from open_clip.transformer import TextTransformer

    if config.name == FROM_SCRATCH_TEXT:
        sizes = {"vocab_size": tokenizer.vocab_size, "context_length": config.context_length}
        return TextTransformer(**(sizes | {"output_dim": None} | config.options))
    if _pretrained(config, saved) is not None:
        return _returns_one_tensor(_whole_model(config, config.options).text)
    from open_clip.model import _build_text_tower

    sizes = _model_config(config.name, config.options)
    _refuse_hub_model(config, sizes["text_cfg"])
    own_length = sizes["text_cfg"].get("context_length", 77)
    if sizes["text_cfg"].get("embed_cls") and config.context_length != own_length:
        raise InputError(
            f"model.text.context_length={config.context_length}: open_clip's {config.name} has a "
            f"class token with a position of its own behind {own_length} tokens; set "
            f"context_length: {own_length}"
        )
    sizes["text_cfg"]["context_length"] = max(own_length, config.context_length)
    return _returns_one_tensor(
        _build_text_tower(sizes["embed_dim"], sizes["text_cfg"], sizes.get("quick_gelu", False))
    )


def _pretrained(config: MediaTower | TextTower, saved: Path | None) -> str | None:
    """The tag or file of the weights to load; None to build the tower from scratch."""
    import open_clip

    if config.pretrained is True:
        raise InputError(
            f"open_clip model {config.name}: pretrained: true does not name the weights; give a "
            f"tag ({', '.join(open_clip.list_pretrained_tags_by_model(config.name))}) or a file"
        )
    return config.pretrained if config.pretrained and not saved else None


def _whole_model(config: MediaTower | TextTower, options: dict[str, Any]) -> nn.Module:
    """The model with both towers: open_clip's weight files hold both."""
    import open_clip

    _refuse_unknown_name(config.name)
    return open_clip.create_model(
        config.name, pretrained=config.pretrained, force_custom_text=True, **options
    )


def _model_config(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """open_clip's config of a model, with the options that its create_model would apply."""
    import open_clip

    _refuse_unknown_name(name)
    sizes = deepcopy(open_clip.get_model_config(name))
    for section in ("vision_cfg", "text_cfg"):
        sizes[section] = dict(sizes[section], **_WITHOUT_WEIGHTS[section])
    for option, value in options.items():
        if option in _FORCED_OPTIONS:
            section, key = _FORCED_OPTIONS[option]
            (sizes if section is None else sizes[section])[key] = value
        elif option in sizes:
            sizes[option] = value
        else:
            known = sorted([*_FORCED_OPTIONS, *sizes])
            raise InputError(
                f"open_clip's {name} has no option {option!r}; use one of {', '.join(known)}"
            )
    return sizes


# Parts of a model may be pretrained by themselves, which would download them.
_WITHOUT_WEIGHTS = {
    "vision_cfg": {"timm_model_pretrained": False},
    "text_cfg": {"hf_model_pretrained": False},
}


def _refuse_unknown_name(name: str) -> None:
    import open_clip

    if name not in open_clip.list_models():
        raise InputError(f"open_clip has no model {name!r}; see open_clip.list_models()")


def _refuse_hub_model(config: TextTower, text_config: dict[str, Any]) -> None:
    """Refuses text towers whose sizes only a hub knows."""
    model = text_config.get("hf_model_name")
    if model and not Path(model).is_dir():
        raise InputError(
            f"model.text: the text tower of open_clip's {config.name} is {model} of transformers; "
            f"build it with library: transformers, name: {model} (or its folder) and pretrained: "
            "true"
        )


def _returns_one_tensor(tower: nn.Module) -> nn.Module:
    """CoCa's towers would also return their tokens, for its captioning decoder."""
    if getattr(tower, "output_tokens", False):
        tower.output_tokens = False
    return tower
