"""open_clip models, from a `local-dir:` folder, or from a weights file and an architecture."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor

from data_prep.errors import InputError
from data_prep.media.decode import decode_image
from eval.models.loaded_model import LoadedModel, ModelOrigin, normalized
from eval.models.model_source import LOCAL_DIR, ModelSource, checksum_of_files
from pretrain.model.library_errors import describe_library_error


class OpenClipModel(torch.nn.Module):
    """Adapts an open_clip model to `encode`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode(self, modality: str, inputs: Tensor) -> Tensor:
        """Encodes images [B, 3, H, Wd] or int64 tokens [B, L] to L2-normalised [B, D]."""
        encoders = {"image": self.model.encode_image, "text": self.model.encode_text}
        return normalized(encoders[modality](inputs))


class PilTransform:
    """Adapter for another library's transform of PIL images."""

    def __init__(self, prepare: Any) -> None:
        self.prepare = prepare  # PIL image -> float32 [3, H, Wd]

    def decode(self, content: bytes, extension: str) -> np.ndarray:
        """Decodes an image to uint8 [H, Wd, 3].

        Raises:
            data_prep.media.decode.MediaError: if the bytes are damaged, or there are too many
                pixels.
        """
        return decode_image(content, extension)

    def __call__(self, image: np.ndarray) -> Tensor:
        """Transforms uint8 [H, Wd, 3] to float32 [3, size, size], normalised."""
        return self.prepare(Image.fromarray(image))


def load_open_clip(source: ModelSource) -> LoadedModel:
    """Loads the model, its evaluation transform and its tokenizer.

    Raises:
        InputError: if the architecture is unknown to open_clip, or the weights do not fit it.
    """
    if source.architecture is None:
        name, weights = f"{LOCAL_DIR}{source.path}", None
    else:
        name, weights = source.architecture, str(source.path)
        if name not in open_clip.list_models():
            raise InputError(
                f"open_clip_architecture: expected one of {', '.join(open_clip.list_models())}; "
                f"found {name!r}"
            )
    sha256 = checksum_of_files(source.path)
    try:
        model, _, prepare = open_clip.create_model_and_transforms(
            name, pretrained=weights, require_pretrained=True
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # libraries raise errors of any type
        raise InputError(
            f"{source.path}: open_clip cannot load it: {describe_library_error(error)}"
        ) from error
    settings = {
        "architecture": source.architecture,
        "model_cfg": open_clip.get_model_config(name),
        "tokenizer": _tokenizer_settings(tokenizer),
    }
    return LoadedModel(
        OpenClipModel(model),
        {"image": "image", "text": "text"},
        {"image": PilTransform(prepare)},
        {"image": {"open_clip": str(prepare)}},
        tokenizer,
        ModelOrigin("open_clip", source.path, sha256, settings=settings),
    )


def _tokenizer_settings(tokenizer: Any) -> dict[str, Any]:
    """Identifies a tokenizer; open_clip may have fetched its vocabulary by name from a hub."""
    backend = getattr(tokenizer, "tokenizer", None)  # of transformers
    if backend is None:
        content = json.dumps(tokenizer.encoder, sort_keys=True)
    elif backend.is_fast:
        content = backend.backend_tokenizer.to_str()
    else:
        content = json.dumps(backend.get_vocab(), sort_keys=True)
    return {
        "class": type(tokenizer).__name__,
        "context_length": tokenizer.context_length,
        "vocabulary_sha256": hashlib.sha256(content.encode()).hexdigest(),
    }
