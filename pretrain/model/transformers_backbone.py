"""Media and text backbones of transformers, from a model type or from a saved model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import InputError
from pretrain.config import MediaKind, MediaTower, TextTower
from pretrain.model.tokenizer import Tokenizer

# Model type of transformers -> its inputs from a log-mel spectrogram [B, 1, F, S].
_AUDIO_INPUTS: dict[str, Callable[[Tensor], dict[str, Tensor]]] = {
    "audio-spectrogram-transformer": lambda mel: {"input_values": mel[:, 0].transpose(1, 2)},
}
# Names that config classes accept in addition to their own attributes.
_OLD_ROPE_NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_NAMES_OF_ALL_CONFIGS = ("attn_implementation", "experts_implementation")
# Options that say where and how to find a saved model.
_SOURCE_OPTIONS = (
    *("cache_dir", "code_revision", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token", "trust_remote_code"),
)


class TransformersMedia(nn.Module):
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


def build_transformers_media(config: MediaTower, kind: MediaKind, assets: Path | None) -> nn.Module:
    """Builds a media model of transformers; see `build_media_backbone`."""
    return TransformersMedia(_transformers_model(config, assets, kind), kind)


def build_transformers_text(
    config: TextTower, tokenizer: Tokenizer, assets: Path | None
) -> nn.Module:
    """Builds a text model of transformers; see `build_text_backbone`."""
    model = _transformers_model(config, assets, "text")
    return TransformersText(model, pad_id=tokenizer.pad_id, pooling=config.pooling)


# --------------------------------------------------------------------------------------- models


def _transformers_model(
    config: MediaTower | TextTower, assets: Path | None, kind: str
) -> nn.Module:
    """The model in float32, whichever type its weights are saved in."""
    from transformers import AutoConfig, AutoModel

    if assets is not None:
        saved = AutoConfig.from_pretrained(assets / f"{kind}_tower")
        return AutoModel.from_config(saved, dtype=torch.float32)
    if config.pretrained:
        name = config.name if config.pretrained is True else config.pretrained
        model = _load_model(name, config.options)
    else:
        refuse_unknown_options(_config_class(config.name), config.options)
        settings = AutoConfig.for_model(config.name, **config.options)
        _refuse_missing_class(settings)
        model = AutoModel.from_config(settings, dtype=torch.float32)
    if hasattr(model, "get_text_features"):
        raise ValueError(
            f"expected a model of one modality, found {model.config.model_type!r}, which has a "
            "tower of its own for media and another for text; choose a model with one tower"
        )
    return model


def _load_model(name: str, options: dict[str, Any]) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    of_source = {key: value for key, value in options.items() if key in _SOURCE_OPTIONS}
    settings = AutoConfig.from_pretrained(name, **of_source)
    if not hasattr(settings, "auto_map"):  # a model with code of its own
        _refuse_missing_class(settings)
    try:
        return AutoModel.from_pretrained(name, dtype=torch.float32, **options)
    except TypeError:  # options unknown to the config are arguments of the model
        refuse_unknown_options(type(settings), options)
        raise


def _config_class(model_type: str) -> type:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers has no model type {model_type!r}{_nearest(model_type, CONFIG_MAPPING)}; "
            "give a model type, or a folder or model of a hub with pretrained: true"
        )
    return CONFIG_MAPPING[model_type]


def _refuse_missing_class(settings: Any) -> None:
    from transformers import MODEL_MAPPING

    if type(settings) not in MODEL_MAPPING:
        raise ValueError(
            f"transformers' AutoModel does not build the model type {settings.model_type!r}; "
            "choose another model type"
        )


# -------------------------------------------------------------------------------------- options


def refuse_unknown_options(config_class: type, options: dict[str, Any]) -> None:
    """Refuses options that transformers would store without using them.

    Args:
        config_class: config class of a transformers model.
        options: options of the tower.

    Raises:
        ValueError: if the class has no attribute of that name.
    """
    known = _known_options(config_class)
    for name in options:
        if name in known or _reads_by_name(config_class, name):
            continue
        is_method = hasattr(config_class, name)
        if is_method or not _changes_config(config_class, options, name):
            raise ValueError(
                f"{config_class.__name__} has no option {name!r}{_nearest(name, known)}; correct "
                "or remove it"
            )


def _known_options(config_class: type) -> set[str]:
    settable = {
        name
        for name, value in inspect.getmembers(config_class)
        if isinstance(value, property) and value.fset is not None
    }
    arguments = set(inspect.signature(config_class.__init__).parameters)
    own = set(config_class().to_dict()) | settable | arguments - {"self", "args", "kwargs"}
    if "rope_parameters" in own:
        own.update(_OLD_ROPE_NAMES)
    return own | {*config_class.attribute_map, *_NAMES_OF_ALL_CONFIGS}


def _reads_by_name(config_class: type, name: str) -> bool:
    """Whether the code of a config class reads an option from its keyword arguments."""
    try:
        source = inspect.getsource(config_class)
    except (OSError, TypeError):  # a class without a source file
        return False
    return f'kwargs.pop("{name}"' in source or f'kwargs.get("{name}"' in source


def _changes_config(config_class: type, options: dict[str, Any], name: str) -> bool:
    """Whether an option changes the config beyond an attribute of the same name."""
    others = {key: value for key, value in options.items() if key != name}
    try:
        changed, unchanged = config_class(**options).to_dict(), config_class(**others).to_dict()
    except Exception:  # building the model reports it
        return True
    return _without(changed, name) != _without(unchanged, name)


def _without(settings: Any, name: str) -> Any:
    """The settings without a name, at any depth: configs pass options on to nested configs."""
    if not isinstance(settings, dict):
        return settings
    return {key: _without(value, name) for key, value in settings.items() if key != name}


def _nearest(name: str, known: Iterable[str]) -> str:
    nearest = get_close_matches(name, sorted(known))
    return f" (nearest: {', '.join(nearest)})" if nearest else ""
