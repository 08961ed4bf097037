"""Finds out what a path holds: a checkpoint of ours, or a model of open_clip's or Hugging Face's.

    runs/mine, runs/mine/checkpoints/step_00001000      ours: a run (its newest), or one checkpoint
    a folder with open_clip_config.json                 open_clip's "local-dir:", with or without it
    a file of weights, with open_clip_architecture      open_clip's, by the name of its architecture
    a folder with config.json                           Hugging Face's CLIP, SigLIP or CLAP

Needs no torch, so that a wrong path is told of before anything is loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data_prep.errors import InputError
from pretrain.checkpoints.store import find_locations

Library = Literal["isopair", "open_clip", "hugging_face"]
LOCAL_DIR = "local-dir:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
HUGGING_FACE_CONFIG = "config.json"
HUGGING_FACE_TYPES = ("clip", "siglip", "clap")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


@dataclass(frozen=True)
class ModelSource:
    """Where a model is, and which library built it."""

    library: Library
    path: Path
    architecture: str | None = None  # open_clip's name of it, where the path is a file of weights


def find_model(checkpoint: Path, *, architecture: str | None = None) -> ModelSource:
    """What is at the path of a config's key checkpoint.

    Args:
        checkpoint: see the module.
        architecture: the config's open_clip_architecture.

    Raises:
        InputError: there is no model, or not one that can be evaluated.
    """
    path = Path(str(checkpoint).removeprefix(LOCAL_DIR))
    if architecture is not None:
        if not path.is_file():
            raise InputError(
                f"{path}: expected a file of weights, because open_clip_architecture is "
                f"{architecture!r}; found {'a folder' if path.is_dir() else 'nothing'}"
            )
        return ModelSource("open_clip", path, architecture)
    if path.is_file():
        raise InputError(
            f"{path}: expected a folder; for a file of weights set open_clip_architecture to "
            "open_clip's name of the model, such as ViT-B-32"
        )
    if (path / OPEN_CLIP_CONFIG).exists():
        return ModelSource("open_clip", path)
    if (path / HUGGING_FACE_CONFIG).exists():
        return ModelSource("hugging_face", _of_known_type(path))
    if find_locations(str(checkpoint)):
        return ModelSource("isopair", checkpoint)
    raise InputError(
        f"{checkpoint}: expected a run folder with a checkpoint, or a checkpoint (key: "
        f"checkpoint), or a folder with {OPEN_CLIP_CONFIG} or a model of Hugging Face's; found "
        "none; python -m pretrain.train makes one"
    )


def _of_known_type(folder: Path) -> Path:
    path = folder / HUGGING_FACE_CONFIG
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: expected Hugging Face's config of a model: {error}") from None
    if found not in HUGGING_FACE_TYPES:
        raise InputError(
            f"{path}: expected model_type {', '.join(HUGGING_FACE_TYPES)}; found {found!r}"
        )
    return folder


def sum_of_files(path: Path) -> str:
    """sha256 over the names and sums of a folder's weights and settings, or of one file.

    Raises:
        InputError: the folder holds no weights.
    """
    files = sorted(_files_of_model(path)) if path.is_dir() else [path]
    if not any(file.suffix in WEIGHT_SUFFIXES for file in files):
        raise InputError(
            f"{path}: expected weights ({', '.join(WEIGHT_SUFFIXES)}), found none; copy all files "
            "of the model"
        )
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _files_of_model(folder: Path) -> Iterable[Path]:
    suffixes = (*WEIGHT_SUFFIXES, ".json", ".txt", ".model")
    return (path for path in folder.iterdir() if path.suffix in suffixes)
