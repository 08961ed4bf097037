"""Detects the library of a model from its path.

    runs/mine                                           Isopair: newest checkpoint of a run
    runs/mine/checkpoints/step_00001000                 Isopair: one checkpoint
    folder with open_clip_config.json                   open_clip; may have the prefix "local-dir:"
    weights file, with open_clip_architecture           open_clip
    folder with config.json                             Hugging Face's CLIP, SigLIP or CLAP

Does not import torch, so that a wrong path is reported before any slow import.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from data_prep.errors import InputError
from pretrain.checkpoints.record import WeightsKind
from pretrain.checkpoints.store import find_locations
from pretrain.model.source_files import fingerprint_of_files

Library = Literal["isopair", "open_clip", "hugging_face"]
LOCAL_DIR = "local-dir:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
HUGGING_FACE_CONFIG = "config.json"
HUGGING_FACE_TYPES = ("clip", "siglip", "clap")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ModelSource:
    """Path and library of a model."""

    library: Library
    path: Path
    architecture: str | None = None  # open_clip's name, if the path is a weights file
    weights: WeightsKind = "plain"  # of a checkpoint of Isopair


def find_model(
    checkpoint: Path, *, architecture: str | None = None, weights: WeightsKind = "plain"
) -> ModelSource:
    """Finds the model at a path and detects its library.

    Args:
        checkpoint: path in one of the forms listed in the module's docstring.
        architecture: open_clip's name of the architecture, for a weights file.
        weights: kind of weights; only checkpoints of Isopair have others than plain ones.

    Raises:
        InputError: if the model is missing, its type is not supported, or it has no such weights.
    """
    source = _find_model(checkpoint, architecture=architecture)
    if weights == "plain":
        return source
    if source.library != "isopair":
        raise InputError(
            f"{checkpoint}: weights={weights} needs a checkpoint of Isopair, found a model of "
            f"{source.library}; remove weights"
        )
    return replace(source, weights=weights)


def _find_model(checkpoint: Path, *, architecture: str | None) -> ModelSource:
    path = Path(str(checkpoint).removeprefix(LOCAL_DIR))
    if architecture is not None:
        if not path.is_file():
            raise InputError(
                f"{path}: expected a weights file, because open_clip_architecture is "
                f"{architecture!r}; found {'a folder' if path.is_dir() else 'nothing'}"
            )
        return ModelSource("open_clip", path, architecture)
    if path.is_file():
        raise InputError(
            f"{path}: expected a folder; for a weights file set open_clip_architecture to "
            "open_clip's name of the model, such as ViT-B-32"
        )
    if (path / OPEN_CLIP_CONFIG).exists():
        return ModelSource("open_clip", path)
    if (path / HUGGING_FACE_CONFIG).exists():
        return ModelSource("hugging_face", _of_known_type(path))
    if find_locations(str(checkpoint)):
        return ModelSource("isopair", checkpoint)
    raise InputError(
        f"{checkpoint}: expected a run folder with a checkpoint, a checkpoint, a folder with "
        f"{OPEN_CLIP_CONFIG}, or a Hugging Face model (key: checkpoint); found none of them; "
        "python -m pretrain.train creates a run"
    )


def _of_known_type(folder: Path) -> Path:
    path = folder / HUGGING_FACE_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected the config of a Hugging Face model: {error}") from None
    if found not in HUGGING_FACE_TYPES:
        raise InputError(
            f"{path}: expected model_type {', '.join(HUGGING_FACE_TYPES)}; found {found!r}"
        )
    return folder


def checksum_of_files(path: Path) -> str:
    """Computes the SHA-256 of one file, or of the weights and settings in a folder.

    It covers file names and contents.

    Raises:
        InputError: if the folder holds no weights.
    """
    files = sorted(_files_of_model(path)) if path.is_dir() else [path]
    if not any(file.suffix in WEIGHT_SUFFIXES for file in files):
        raise InputError(
            f"{path}: expected weights ({', '.join(WEIGHT_SUFFIXES)}), found none; copy all files "
            "of the model"
        )
    return fingerprint_of_files(files)


def _files_of_model(folder: Path) -> Iterable[Path]:
    suffixes = (*WEIGHT_SUFFIXES, ".json", ".txt", ".model")
    return (path for path in folder.iterdir() if path.suffix in suffixes)
