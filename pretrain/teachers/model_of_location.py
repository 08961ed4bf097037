"""Models of open_clip and transformers as config sections, from the files that describe them.

    open_clip:<model>/<tag>             open_clip's config of the model, and the tag's preprocessing
    folder with open_clip_config.json   the same from the file
    folder with config.json             CLIP, SigLIP, SigLIP 2, MetaCLIP 2 or CLAP of transformers,
    <owner>/<name>[@<revision>]         with its processor; or the same in a hub's cache

The sections build a model whose towers start from the location (see pretrain.warm_start), so its
embeddings are those of the library.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from data_prep.errors import InputError
from pretrain.hub import HUB_PREFIX, OPEN_CLIP_PREFIX
from pretrain.settings.model import LARGEST_LOGIT_SCALE, Model
from pretrain.settings.transforms import AudioTransform, ImageTransform
from pretrain.towers.own_preprocessing import own_preprocessing
from pretrain.warm_start.source import LOCAL_DIR, find_source, folder_of

OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG = "open_clip_config.json", "config.json"
CLAP_TOKENS = 77  # text length in LAION's training; the tokenizer would allow 512
# Model type of transformers -> projection of its towers
_PROJECTIONS = {
    **dict.fromkeys(("clip", "metaclip_2"), "linear"),
    **dict.fromkeys(("siglip", "siglip2"), "none"),
    "clap": "mlp",
}


@dataclass(frozen=True)
class DescribedModel:
    """Config sections of a model of another library."""

    model: Model
    image: ImageTransform
    audio: AudioTransform


def is_foreign(location: str) -> bool:
    """Returns whether a location is that of a model of another library."""
    path = Path(location.removeprefix(LOCAL_DIR))
    if path.is_dir():
        return any((path / name).is_file() for name in (OPEN_CLIP_CONFIG, TRANSFORMERS_CONFIG))
    if path.is_file():
        return True
    return location.startswith((OPEN_CLIP_PREFIX, HUB_PREFIX)) or folder_of(location) is not None


def describe_model(location: str, *, where: str) -> DescribedModel:
    """Describes a model of another library by config sections.

    Args:
        location: place of the model, as in the docstring of this module.
        where: config key of the location, for messages.

    Raises:
        InputError: if the model is missing, or no sections describe it.
    """
    if not location.startswith(OPEN_CLIP_PREFIX):
        folder = folder_of(location)
        if folder is None:
            find_source(location, where=where)  # names the command that fetches a hub's model
            raise InputError(
                f"{where}={location}: a file of weights does not describe its model; name a folder "
                f"with {OPEN_CLIP_CONFIG} or {TRANSFORMERS_CONFIG}, a model of a hub, or "
                f"{OPEN_CLIP_PREFIX}<model>/<tag>"
            )
        if not (folder / OPEN_CLIP_CONFIG).is_file():
            return _of_transformers(location, folder, where)
    return _of_open_clip(location, where)


def _of_open_clip(location: str, where: str) -> DescribedModel:
    name, sizes = _open_clip_model(location, where)
    tower = {"library": "open_clip", "name": name, "frozen": True, "attention_dropout": False}
    tower |= {"start": {"from": location}}
    text = tower | {"context_length": sizes["text_cfg"].get("context_length", 77)}
    model = {"embed_dim": sizes["embed_dim"], "image": tower, "text": text}
    size = sizes["vision_cfg"].get("image_size", 224)
    if not isinstance(size, int):
        raise InputError(f"{where}={location}: expected square images, found size {size}")
    return _described(model, size=size, where=f"{where}={location}")


def _open_clip_model(location: str, where: str) -> tuple[str, Mapping[str, Any]]:
    """The name of a model, and open_clip's config of it."""
    import open_clip

    if location.startswith(OPEN_CLIP_PREFIX):
        name = location.removeprefix(OPEN_CLIP_PREFIX).partition("/")[0]
        sizes = open_clip.get_model_config(name)
        if sizes is None:
            raise InputError(f"{where}={location}: open_clip has no model {name!r}")
        return name, sizes
    path = folder_of(location) / OPEN_CLIP_CONFIG
    sizes = _read_json(path).get("model_cfg", {})
    for name in open_clip.list_models():
        if _without_weights(open_clip.get_model_config(name)) == _without_weights(sizes):
            return name, sizes
    raise InputError(
        f"{where}: {path}: expected the model_cfg of a model in open_clip.list_models(), found "
        "another; register it with open_clip.add_model_config"
    )


def _without_weights(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """A config without what only says whether parts are downloaded."""
    names = ("timm_model_pretrained", "hf_model_pretrained", "custom_text")
    return {
        key: _without_weights(value) if isinstance(value, dict) else value
        for key, value in sizes.items()
        if key not in names
    }


def _of_transformers(location: str, folder: Path, where: str) -> DescribedModel:
    from transformers import AutoConfig

    found = _read_json(folder / TRANSFORMERS_CONFIG).get("model_type")
    if found not in _PROJECTIONS:
        raise InputError(
            f"{where}={location}: expected a model of type {', '.join(_PROJECTIONS)}, found "
            f"{found!r}"
        )
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    projection, text = _PROJECTIONS[found], config.text_config
    tower = {"library": "transformers", "name": str(folder), "frozen": True}
    tower |= {"start": {"from": location}, "attention_dropout": False}
    tower |= {"pooling": "own", "projection": projection}
    length = text.max_position_embeddings
    if found == "clap":
        length = min(CLAP_TOKENS, length - 2)  # RoBERTa's positions start at 2
    width = text.hidden_size if projection == "none" else config.projection_dim
    width = getattr(text, "projection_size", width) if projection == "none" else width
    model = {"embed_dim": width, "text": tower | {"context_length": length}}
    model["audio" if found == "clap" else "image"] = tower
    size = 0 if found == "clap" else _image_size(config.vision_config)
    return _described(model, size=size, where=f"{where}={location}")


def _image_size(vision: Any) -> int:
    """The size of the positions; NaFlex models have positions of a square number of patches."""
    size = getattr(vision, "image_size", None)
    return size or vision.patch_size * math.isqrt(vision.num_patches)


def _described(model: dict[str, Any], *, size: int, where: str) -> DescribedModel:
    """Adds the preprocessing of the source; images have `size` if it names no other."""
    kind = "audio" if "audio" in model else "image"
    scale = {"initial": LARGEST_LOGIT_SCALE, "maximum": LARGEST_LOGIT_SCALE}
    section = Model.model_validate(model | {"logit_scale": scale})
    own = own_preprocessing(section.towers[kind], kind, folder_of) or {}
    values: dict[str, Any] = {"size": size} if kind == "image" else {}
    for key, value in own.items():
        *sections, name = key.split(".")
        inner = values
        for each in sections:
            inner = inner.setdefault(each, {})
        inner[name] = value
    image, audio = ImageTransform(), AudioTransform()
    try:
        if kind == "image":
            image = ImageTransform.model_validate(values)
        else:
            audio = AudioTransform.model_validate(values)
    except ValidationError as error:
        found = "; ".join(
            f"{'.'.join(map(str, each['loc']))}={each['input']}: {each['msg']}"
            for each in error.errors()
        )
        raise InputError(
            f"{where}: this preprocessing of the model is not supported: {found}; choose another "
            "teacher"
        ) from None
    return DescribedModel(section, image, audio)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: expected the config of a model: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected an object, found {found!r:.80}")
    return found
