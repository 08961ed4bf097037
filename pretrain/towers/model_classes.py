"""Model classes of transformers by kind of tower and model type.

transformers' AutoModel builds few of the halves of dual encoders, and only whole models of others.
Here, a whole model's type (clip, clap) stands for the half that the tower needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class TowerClass(NamedTuple):
    """A model class of transformers and the part of it that is a tower.

    Attributes:
        name: class that is built from a config.
        loader: class that loads saved weights; None for the same class.
        part: attribute of the loaded model that holds the tower.
        prefix: beginning of the names of the tower's weights in a folder of the whole model, if
            transformers does not remove it.
    """

    name: str
    loader: str | None = None
    part: str | None = None
    prefix: str | None = None


# Kind of tower -> model type -> class.
TOWER_CLASSES: Mapping[str, Mapping[str, TowerClass]] = {
    "image": {
        "clip_vision_model": TowerClass("CLIPVisionModel"),
        "siglip_vision_model": TowerClass("SiglipVisionModel"),
        "siglip2_vision_model": TowerClass("Siglip2VisionModel"),
        "metaclip_2_vision_model": TowerClass("MetaClip2VisionModel"),
    },
    "audio": {
        "audio-spectrogram-transformer": TowerClass("ASTModel"),
        "clap_audio_model": TowerClass("ClapAudioModel", prefix="audio_model."),
        "whisper": TowerClass("WhisperEncoder", loader="WhisperModel", part="encoder"),
    },
    "text": {
        "clip_text_model": TowerClass("CLIPTextModel"),
        "siglip_text_model": TowerClass("SiglipTextModel"),
        "siglip2_text_model": TowerClass("Siglip2TextModel"),
        "metaclip_2_text_model": TowerClass("MetaClip2TextModel"),
        "clap_text_model": TowerClass("ClapTextModel", prefix="text_model."),
        "t5": TowerClass("T5EncoderModel"),
        "mt5": TowerClass("MT5EncoderModel"),
        "umt5": TowerClass("UMT5EncoderModel"),
    },
}
# Classes that transformers does not export at its top.
_MODULES = {"WhisperEncoder": "transformers.models.whisper.modeling_whisper"}
# Model type of a dual encoder -> kind of tower -> attribute of its config.
_IMAGE_AND_TEXT = {"image": "vision_config", "text": "text_config"}
HALVES: Mapping[str, Mapping[str, str]] = {
    "clip": _IMAGE_AND_TEXT,
    "siglip": _IMAGE_AND_TEXT,
    "siglip2": _IMAGE_AND_TEXT,
    "metaclip_2": _IMAGE_AND_TEXT,
    "clap": {"audio": "audio_config", "text": "text_config"},
}


def half_of(settings: Any, *, kind: str) -> Any:
    """Returns the config of the half that a tower needs; the same config for other models.

    Args:
        settings: config of a transformers model.
        kind: "image", "audio" or "text".

    Raises:
        ValueError: if the dual encoder has no half of this kind.
    """
    halves = HALVES.get(settings.model_type)
    if halves is None:
        return settings
    if kind not in halves:
        raise ValueError(
            f"model type {settings.model_type!r} has towers for {' and '.join(halves)}, none for "
            f"{kind}; choose another model type"
        )
    return getattr(settings, halves[kind])


def options_of_half(model_type: str, options: dict[str, Any], *, kind: str) -> dict[str, Any]:
    """Returns the options of the half that a tower needs; the same object for other models.

    Args:
        model_type: model type that the tower's config names.
        options: its options; those of a dual encoder's half are a dictionary of their own.
        kind: "image", "audio" or "text".

    Raises:
        ValueError: if an option of a dual encoder is in no half's dictionary.
    """
    halves = HALVES.get(model_type, {})
    if kind not in halves:  # no dual encoder; or `half_of` refuses it
        return options
    others = sorted(options.keys() - set(halves.values()))
    own = options.get(halves[kind], {})
    if others or not isinstance(own, dict):
        inner = ", ".join(f"{key}: ..." for key in others) or "..."
        raise ValueError(
            f"the options of {model_type}'s tower for {kind} belong to its half's section; write "
            f"options: {{{halves[kind]}: {{{inner}}}}}"
        )
    return dict(own)


def tower_class(model_type: str, *, kind: str) -> TowerClass | None:
    """Returns the class of a model type; None if AutoModel builds it.

    Raises:
        ValueError: if the model type is one of another kind of tower.
    """
    classes = TOWER_CLASSES[kind]
    for other, types in TOWER_CLASSES.items():
        if kind != "audio" and other != kind and model_type in types:
            raise ValueError(
                f"model type {model_type!r} is one of {other} towers; choose one for {kind}"
            )
    if kind == "audio" and model_type not in classes:
        raise ValueError(
            "expected a transformers model type that takes log-mel spectrograms "
            f"({', '.join(classes)}, or clap), found {model_type!r}; use one of them or library: "
            "timm"
        )
    return classes.get(model_type)


def find_class(name: str) -> type:
    """Returns a model class of transformers."""
    import importlib

    return getattr(importlib.import_module(_MODULES.get(name, "transformers")), name)
