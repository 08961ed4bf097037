"""Preprocessing that weights were trained with, compared with the sections `image` and `audio`.

Weights say it in different places:

    transformers   preprocessor_config.json or processor_config.json of the folder
    timm           pretrained_cfg of the tag, or in config.json of the folder
    open_clip      the tag, or preprocess_cfg in open_clip_config.json of the folder

A file of weights alone says nothing, and nothing is compared.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import ConfigError, InputError
from pretrain.settings.model import MediaTower, Model
from pretrain.settings.transforms import AudioTransform, ImageTransform

logger = logging.getLogger(__name__)

Settings = dict[str, Any]  # dotted key in the section -> value
FolderOf = Callable[[str], Path | None]

OPEN_CLIP, TIMM = "open_clip:", "timm:"  # beginnings of tags in `start.from`
_TOLERANCE = 1e-4  # of means and deviations: libraries write them with different numbers of digits
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# PIL's numbers, in the processors of transformers.
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}


def refuse_other_preprocessing(
    model: Model, *, image: ImageTransform, audio: AudioTransform, folder_of: FolderOf
) -> None:
    """Compares the preprocessing of media with that of the weights that towers begin with.

    Args:
        model: config section `model`.
        image: config section `image`.
        audio: config section `audio`.
        folder_of: finds the folder of a location, also in the hub's cache; None if there is none.

    Raises:
        ConfigError: if a setting differs.
        InputError: if the weights' own settings cannot be read.
    """
    sections: dict[str, ImageTransform | AudioTransform] = {"image": image, "audio": audio}
    for name, tower in model.towers.items():
        kind = model.kinds[name]
        if not isinstance(tower, MediaTower) or not (tower.start or tower.pretrained):
            continue
        section = sections[kind]
        source = tower.start.location if tower.start else str(tower.pretrained)
        own = own_preprocessing(tower, kind, folder_of)
        if own is None:
            logger.info(
                "%s: %s does not say how its %s were preprocessed; compare the section %s yourself",
                *(model.tower_key(name), source, "images" if kind == "image" else "sounds", kind),
            )
            continue
        if tower.start is not None and tower.start.resample:
            for size in ("size", "log_mel.num_frames"):  # positions are resampled to them
                own.pop(size, None)
        if isinstance(section, ImageTransform) and own.get("size") in section.sizes.values():
            own.pop("size")  # that of a segment
        weights = tower.name if source == "True" else source
        refuse_differences(own, section, kind=kind, source=weights)


def refuse_differences(
    own: Settings, section: ImageTransform | AudioTransform, *, kind: str, source: str
) -> None:
    """Compares settings with a config section.

    Args:
        own: settings of the weights.
        section: config section `image` or `audio`.
        kind: name of the section.
        source: name of the weights, for the message.

    Raises:
        ConfigError: if one differs; the message has the lines to write.
    """
    found = {key: _value(section, key) for key in own}
    different = {key: own[key] for key in own if not _is_same(own[key], found[key])}
    if different:
        raise ConfigError(
            f"{kind}: expected the preprocessing of {source}, "
            f"{', '.join(f'{key}={value}' for key, value in different.items())}; found "
            f"{', '.join(f'{key}={found[key]}' for key in different)}; set {kind}: "
            f"{_as_yaml(different)}"
        )


def _value(section: Any, key: str) -> Any:
    for name in key.split("."):
        section = getattr(section, name)
    return list(section) if isinstance(section, tuple) else section


def _is_same(own: Any, found: Any) -> bool:
    if isinstance(own, list):
        return len(own) == len(found) and all(map(_is_same, own, found))
    if isinstance(own, float) and found is not None and not isinstance(found, str):
        return math.isclose(own, found, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
    return own == found


def _as_yaml(settings: Settings) -> str:
    """The settings as one line of YAML, with a dictionary for each dotted beginning"""
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        inner = tree
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return json.dumps(tree).replace('"', "")


# ------------------------------------------------------------------------------------- sources


def own_preprocessing(tower: MediaTower, kind: str, folder_of: FolderOf) -> Settings | None:
    """Reads the settings of the weights that a tower begins with.

    Args:
        tower: section of the tower, with weights.
        kind: "image" or "audio".
        folder_of: finds the folder of a location; None if there is none.

    Returns:
        {dotted key in the section of the kind: value}, or None if the weights do not say them.
    """
    if tower.start is not None:
        location = tower.start.location
        if location.startswith(OPEN_CLIP):
            return _of_open_clip_tag(*location.removeprefix(OPEN_CLIP).partition("/")[::2])
        if location.startswith(TIMM):
            return _of_timm_name(location.removeprefix(TIMM))
        return settings_of_folder(folder_of(location), kind=kind)
    if tower.library == "timm":
        return _of_timm_name(tower.name) if tower.pretrained is True else None
    if tower.library == "open_clip":
        return _of_open_clip_tag(tower.name, str(tower.pretrained))
    name = tower.name if tower.pretrained is True else str(tower.pretrained)
    return settings_of_folder(folder_of(name), kind=kind)


def settings_of_folder(folder: Path | None, *, kind: str) -> Settings | None:
    """Reads the settings of a folder with weights.

    Args:
        folder: folder of transformers, timm or open_clip.
        kind: "image" or "audio".

    Returns:
        The settings, or None if the folder does not say them.

    Raises:
        InputError: if a file of the folder cannot be read.
    """
    if folder is None or not folder.is_dir():
        return None
    try:
        if any((folder / name).is_file() for name in _PROCESSOR_FILES):
            return _of_processor(folder, kind)
        if kind != "image":
            return None
        for name, key, convert in (
            ("open_clip_config.json", "preprocess_cfg", _of_open_clip),
            ("config.json", "pretrained_cfg", _of_timm),
        ):
            path = folder / name
            found = json.loads(path.read_bytes()).get(key) if path.is_file() else None
            if found:
                return convert(found)
    except Exception as error:  # processors of transformers raise errors of any type
        raise InputError(
            f"{folder}: expected a config of preprocessing, which cannot be read: {error}"
        ) from error
    return None


def _of_timm_name(name: str) -> Settings | None:
    import timm

    prefix, _, folder = name.rpartition(":")
    if prefix == "local-dir":
        return settings_of_folder(Path(folder), kind="image")
    found = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return None if found is None else _of_timm(found.to_dict())


def _of_timm(settings: Mapping[str, Any]) -> Settings:
    own: Settings = {}
    if "input_size" in settings:
        own["size"] = settings["input_size"][-1]
    own |= {key: list(settings[key]) for key in ("mean", "std") if key in settings}
    if "interpolation" in settings:
        own["interpolation"] = settings["interpolation"]
    if settings.get("crop_mode", "center") == "squash":
        return own | {"resize": "squash"}
    fraction = settings.get("crop_pct") or 1.0
    return own | {"resize": "shortest", "crop_fraction": fraction, "longer_side": "truncate"}


def _of_open_clip_tag(name: str, tag: str) -> Settings | None:
    import open_clip

    found = open_clip.get_pretrained_cfg(name, tag)
    return _of_open_clip(found) if found else None


def _of_open_clip(settings: Mapping[str, Any]) -> Settings:
    from open_clip.transform import PreprocessCfg

    own = vars(PreprocessCfg()) | {key: each for key, each in settings.items() if each is not None}
    found: Settings = {key: list(own[key]) for key in ("mean", "std")}
    found |= {"interpolation": own["interpolation"], "resize": own["resize_mode"]}
    if own["resize_mode"] == "shortest":
        found["longer_side"] = "truncate"
    return found


def _of_processor(folder: Path, kind: str) -> Settings | None:
    from transformers import AutoFeatureExtractor, AutoImageProcessor

    if kind == "image":
        return _of_image_processor(AutoImageProcessor.from_pretrained(folder))
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    convert = _EXTRACTORS.get(type(extractor).__name__)
    return None if convert is None else convert(extractor)


def _of_image_processor(processor: Any) -> Settings:
    own: Settings = {}
    if processor.do_normalize:
        own = {"mean": list(processor.image_mean), "std": list(processor.image_std)}
    resample = getattr(processor, "resample", None)
    if resample is not None:
        own["interpolation"] = _INTERPOLATIONS.get(int(resample), str(resample))
    size, crop = getattr(processor, "size", None), getattr(processor, "crop_size", None)
    if getattr(processor, "do_center_crop", None) and crop and size and size.get("shortest_edge"):
        side = crop["height"]
        fraction = side / size["shortest_edge"]
        own |= {"size": side, "resize": "shortest", "longer_side": "truncate"}
        return own | {"crop_fraction": fraction}
    if size and size.get("height"):
        own |= {"size": size["height"], "resize": "squash"}
    return own  # NaFlex: any size


def _of_clap(extractor: Any) -> Settings:
    is_fused = extractor.truncation == "fusion"
    padding = {"pad": "silence"}.get(extractor.padding, extractor.padding)
    return {
        "sample_rate_hz": extractor.sampling_rate,
        "clip_seconds": float(extractor.max_length_s),
        "padding": padding,
        "log_mel.frontend": "decibel",
        "log_mel.fft_samples": extractor.fft_window_size,
        "log_mel.hop_samples": extractor.hop_length,
        "log_mel.num_mel_bins": extractor.feature_size,
        "log_mel.low_hz": float(extractor.frequency_min),
        "log_mel.high_hz": float(extractor.frequency_max),
        "log_mel.mel_scale": "htk" if is_fused else "slaney",
        "log_mel.mel_norm": None if is_fused else "slaney",
        "log_mel.mean_db": 0.0,
        "log_mel.std_db": 1.0,
    }


def _of_whisper(extractor: Any) -> Settings:
    return {
        "sample_rate_hz": extractor.sampling_rate,
        "padding": "silence",
        "log_mel.frontend": "whisper",
        "log_mel.fft_samples": extractor.n_fft,
        "log_mel.hop_samples": extractor.hop_length,
        "log_mel.num_mel_bins": extractor.feature_size,
        "log_mel.low_hz": 0.0,
        "log_mel.high_hz": 8000.0,
        "log_mel.mel_scale": "slaney",
        "log_mel.mel_norm": "slaney",
        "log_mel.mean_db": -4.0,
        "log_mel.std_db": 4.0,
    }


def _of_ast(extractor: Any) -> Settings:
    mean, std = (extractor.mean, 2 * extractor.std) if extractor.do_normalize else (0.0, 1.0)
    return {
        "sample_rate_hz": extractor.sampling_rate,
        "padding": "silence",
        "log_mel.frontend": "kaldi",
        "log_mel.fft_samples": 512,
        "log_mel.window_samples": 400,
        "log_mel.hop_samples": 160,
        "log_mel.num_mel_bins": extractor.num_mel_bins,
        "log_mel.low_hz": 20.0,
        "log_mel.high_hz": extractor.sampling_rate / 2,
        "log_mel.mel_scale": "kaldi",
        "log_mel.mel_norm": None,
        "log_mel.mean_db": mean,
        "log_mel.std_db": std,
        "log_mel.num_frames": extractor.max_length,
    }


# Class of transformers' feature extractors -> its settings as ours.
_EXTRACTORS: dict[str, Callable[[Any], Settings]] = {
    "ClapFeatureExtractor": _of_clap,
    "WhisperFeatureExtractor": _of_whisper,
    "ASTFeatureExtractor": _of_ast,
}
