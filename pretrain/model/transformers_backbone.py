"""Media and text backbones of transformers, from a model type or from a saved model."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.captioning.tower_tokens import tokens_of_map
from pretrain.hub import local_folder, parse_hub_name
from pretrain.model.tokenizer import Tokenizer
from pretrain.settings.model import MediaKind, MediaTower, TextTower
from pretrain.towers.attention_dropout import attention_rates, turn_off_attention_dropout
from pretrain.towers.model_classes import (
    TowerClass,
    find_class,
    half_of,
    options_of_half,
    tower_class,
)
from pretrain.towers.model_inputs import model_inputs, size_options
from pretrain.towers.pooling import pool_tokens

CONFIG_FILE = "config.json"
# Names that config classes accept in addition to their own attributes.
_OLD_ROPE_NAMES = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_NAMES_OF_ALL_CONFIGS = ("attn_implementation", "experts_implementation")
# Models without a mask. To SigLIP, padding is a token like any other. CLIP's tokens only depend on
# those before them; it may pad with its end token, or with a token that captions contain ("!").
SEE_PADDING = ("clip_text_model", "siglip_text_model", "siglip2_text_model")
# Options that say where and how to find a saved model.
_SOURCE_OPTIONS = (
    *("cache_dir", "code_revision", "force_download", "local_files_only", "proxies"),
    *("revision", "subfolder", "token", "trust_remote_code"),
)


class TransformersMedia(nn.Module):
    """A transformers vision or audio model with pooled output [B, W].

    Args:
        backbone: model of transformers.
        pooling: pooling of its tokens; None for its own, or the mean if it has none.
    """

    def __init__(self, backbone: nn.Module, *, pooling: str | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling = pooling
        self.gives_tokens = False

    def forward(self, pixels_or_mel: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        output = self.backbone(**model_inputs(pixels_or_mel, self.backbone.config))
        if self.gives_tokens:
            return self._pool(output), tokens_of_map(output.last_hidden_state)
        return self._pool(output)

    def _pool(self, output: Any) -> Tensor:
        pooled = getattr(output, "pooler_output", None)
        if self.pooling == "own":
            return _own_pooling(pooled, self.backbone).flatten(1)
        if self.pooling is None and pooled is not None:
            return pooled.flatten(1)  # convolutional models: [B, W, 1, 1] -> [B, W]
        hidden = tokens_of_map(output.last_hidden_state)
        mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        return pool_tokens(hidden, mask, pooling=self.pooling or "mean")


class TransformersText(nn.Module):
    """A transformers text model with pooled output [B, W]; padding is masked.

    Args:
        backbone: model of transformers.
        pad_id: token id of padding.
        pooling: pooling of its tokens.
    """

    def __init__(self, backbone: nn.Module, *, pad_id: int, pooling: str) -> None:
        super().__init__()
        self.backbone = backbone
        self.pad_id = pad_id
        self.pooling = pooling
        self.sees_padding = backbone.config.model_type in SEE_PADDING

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != self.pad_id  # [B, L]
        attention_mask = None if self.sees_padding else mask.long()
        output = self.backbone(input_ids=tokens, attention_mask=attention_mask)
        if self.pooling == "own":
            return _own_pooling(getattr(output, "pooler_output", None), self.backbone)
        return pool_tokens(output.last_hidden_state, mask, pooling=self.pooling)


def _own_pooling(pooled: Tensor | None, backbone: nn.Module) -> Tensor:
    if pooled is None:
        raise ValueError(
            f"{type(backbone).__name__} has no pooling of its own; set pooling to mean, first, "
            "last or max"
        )
    return pooled


def build_transformers_media(
    config: MediaTower,
    kind: MediaKind,
    saved: Path | None,
    input_shape: tuple[int, int] | None = None,
) -> nn.Module:
    """Builds a media model of transformers; see `build_media_backbone`."""
    model = _transformers_model(config, saved, kind, input_shape=input_shape)
    return TransformersMedia(model, pooling=config.pooling)


def build_transformers_text(
    config: TextTower, tokenizer: Tokenizer, saved: Path | None
) -> nn.Module:
    """Builds a text model of transformers; see `build_text_backbone`."""
    model = _transformers_model(config, saved, "text")
    return TransformersText(model, pad_id=tokenizer.pad_id, pooling=config.pooling)


# --------------------------------------------------------------------------------------- models


def _transformers_model(
    config: MediaTower | TextTower,
    saved: Path | None,
    kind: str,
    *,
    input_shape: tuple[int, int] | None = None,
) -> nn.Module:
    """The model in float32, whichever type its weights are saved in."""
    from transformers import AutoConfig

    if saved is not None:
        return _from_config(AutoConfig.from_pretrained(saved), kind)
    if config.pretrained:
        name = config.name if config.pretrained is True else config.pretrained
        return _load_model(name, config, kind)
    if Path(config.name).is_dir() or parse_hub_name(config.name):
        settings = _saved_settings(config, kind, input_shape)
    else:
        settings = _new_settings(config, kind, input_shape)
    turn_off_attention_dropout(settings, is_off=not config.attention_dropout)
    return _from_config(settings, kind)


def _new_settings(
    config: MediaTower | TextTower, kind: str, input_shape: tuple[int, int] | None
) -> Any:
    """The config of a model type."""
    from transformers import AutoConfig

    refuse_unknown_options(_config_class(config.name), config.options)
    options = options_of_half(config.name, config.options, kind=kind)
    half = half_of(AutoConfig.for_model(config.name, **config.options), kind=kind)
    if options is not config.options:
        refuse_unknown_options(type(half), options)
    # Built again, because a config derives some values from others.
    sizes = size_options(half.model_type, input_shape)
    return type(half)(**(sizes | options)) if sizes else half


def _saved_settings(
    config: MediaTower | TextTower, kind: str, input_shape: tuple[int, int] | None
) -> Any:
    """The config of a saved model, whose weights are not read; options replace its values."""
    from transformers import AutoConfig

    of_source = {key: value for key, value in config.options.items() if key in _SOURCE_OPTIONS}
    options = {key: value for key, value in config.options.items() if key not in of_source}
    folder = local_folder(config.name, where=f"model.{kind}.name", needs=[CONFIG_FILE])
    half = half_of(AutoConfig.from_pretrained(folder, **of_source), kind=kind)
    refuse_unknown_options(type(half), options)
    sizes = size_options(half.model_type, input_shape)
    return type(half).from_dict(half.to_dict() | sizes | options)


def _from_config(settings: Any, kind: str) -> nn.Module:
    from transformers import AutoModel

    known = tower_class(settings.model_type, kind=kind)
    if known is not None:
        _refuse_fusion(settings)
        return find_class(known.name)(settings)
    _refuse_missing_class(settings)
    return _refuse_two_towers(AutoModel.from_config(settings, dtype=torch.float32))


def _refuse_two_towers(model: nn.Module) -> nn.Module:
    if hasattr(model, "get_text_features"):
        raise ValueError(
            f"expected a model of one modality, found {model.config.model_type!r}, which has a "
            "tower of its own for media and another for text; choose a model with one tower"
        )
    return model


def _load_model(name: str, config: MediaTower | TextTower, kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModel

    options = config.options
    of_source = {key: value for key, value in options.items() if key in _SOURCE_OPTIONS}
    if "cache_dir" not in of_source:
        name = local_folder(name, where=f"model.{kind}", needs=[CONFIG_FILE])
    whole = AutoConfig.from_pretrained(name, **of_source)
    settings = half_of(whole, kind=kind)
    known = tower_class(settings.model_type, kind=kind)
    if known is not None:
        return _load_tower(name, known, settings, config, whole_type=whole.model_type, kind=kind)
    if not hasattr(settings, "auto_map"):  # a model with code of its own
        _refuse_missing_class(settings)
    rates = {} if config.attention_dropout else attention_rates(settings)
    try:
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **(rates | options))
    except TypeError:  # options unknown to the config are arguments of the model
        refuse_unknown_options(type(settings), options)
        raise
    return _refuse_two_towers(model)


def _load_tower(
    name: str,
    known: TowerClass,
    settings: Any,
    config: MediaTower | TextTower,
    *,
    whole_type: str,
    kind: str,
) -> nn.Module:
    """A class of the table with the weights of a folder, which may hold a whole dual encoder."""
    arguments = (*_SOURCE_OPTIONS, *_NAMES_OF_ALL_CONFIGS)  # of from_pretrained
    own = {key: value for key, value in config.options.items() if key not in arguments}
    options = options_of_half(whole_type, own, kind=kind)
    refuse_unknown_options(type(settings), options)
    for key, value in options.items():
        setattr(settings, key, value)
    _refuse_fusion(settings)
    turn_off_attention_dropout(settings, is_off=not config.attention_dropout)
    renamed = {} if known.prefix is None else {f"^{re.escape(known.prefix)}": ""}
    model, loaded = find_class(known.loader or known.name).from_pretrained(
        name,
        config=settings,
        dtype=torch.float32,
        output_loading_info=True,
        key_mapping=renamed or None,
        **{key: value for key, value in config.options.items() if key in arguments},
    )
    if missing := sorted(loaded["missing_keys"]):
        raise ValueError(
            f"expected weights of a {known.name}, which {name} does not hold: "
            f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}; choose the "
            "folder of such a model"
        )
    return getattr(model, known.part) if known.part else model


def _refuse_fusion(settings: Any) -> None:
    if getattr(settings, "enable_fusion", False):
        raise ValueError(
            "fusion of long clips (enable_fusion) is not supported; set options: {enable_fusion: "
            "false}, with which clips of up to clip_seconds are encoded as before"
        )


def _config_class(model_type: str) -> type:
    from transformers import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"transformers has no model type {model_type!r}{_nearest(model_type, CONFIG_MAPPING)}; "
            "give a model type, or a folder or model of a hub (owner/name)"
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
