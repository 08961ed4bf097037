"""A tiny CoCa of open_clip, and configs of runs that train it."""

import json
from pathlib import Path

import open_clip
import torch

from pretrain.config import PretrainConfig
from tests.support.toy_run import toy_config

NAME = "coca_tiny"
CONTEXT_LENGTH = 12
SIZES = {
    "embed_dim": 16,
    "vision_cfg": {
        **{"image_size": 16, "patch_size": 8, "width": 24, "layers": 1, "head_width": 8},
        **{"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 5},
        "output_tokens": True,
    },
    "text_cfg": {
        **{"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 16, "heads": 2},
        **{"layers": 1, "embed_cls": True, "output_tokens": True},
    },
    "multimodal_cfg": {
        **{"context_length": CONTEXT_LENGTH, "vocab_size": 49408, "width": 16, "heads": 2},
        **{"layers": 2, "attn_pooler_heads": 2},
    },
    "custom_text": True,
}
# Of any towers with tokens, with a pooler of the decoder's own.
SMALL_DECODER = {"layers": 1, "heads": 2, "num_queries": 4, "pooler_heads": 2}


def register_tiny_coca(folder: Path) -> None:
    """Makes open_clip know the model NAME."""
    folder.mkdir(exist_ok=True)
    (folder / f"{NAME}.json").write_text(json.dumps(SIZES))
    open_clip.add_model_config(folder)


def build_tiny_coca(folder: Path) -> torch.nn.Module:
    """Builds open_clip's model with random weights, also where the library leaves them unset."""
    register_tiny_coca(folder)
    torch.manual_seed(3)
    model = open_clip.create_model(NAME)
    torch.nn.init.normal_(model.text_decoder.text_projection, std=0.1)
    for parameter in model.parameters():  # so that no weight is zero
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def write_tiny_coca(folder: Path) -> Path:
    """Writes the weights of `build_tiny_coca` as open_clip saves them."""
    path = folder / "coca.pt"
    torch.save(build_tiny_coca(folder).state_dict(), path)
    return path


def coca_config(data: Path, run: Path, /, *, weights: Path | None = None, **sections):
    """Returns the config of a run of the tiny CoCa on the images of `toy_config`.

    Args:
        weights: file of `write_tiny_coca` to start from.
    """
    start = {} if weights is None else {"start": {"from": str(weights)}}
    tower = {"library": "open_clip", "name": NAME}
    model = {
        "embed_dim": 16,
        "image": tower | start,
        "audio": None,
        "text": tower | start | {"context_length": CONTEXT_LENGTH},
    }
    captions = {"kind": "captioning", "name": NAME, "num_queries": None, "weight": 2.0}
    values = toy_config(data, run, **sections).model_dump(mode="json")
    stream = values["streams"]["image-text"]
    stream["objectives"] = {"image-text": {}, "captions": captions | start}
    values |= {"model": model, "streams": {"image-text": stream}}
    return PretrainConfig.model_validate(values)


def small_captioning_config(data: Path, run: Path, /, **sections) -> PretrainConfig:
    """Returns a config of the towers of `toy_config` with captions of images and of sounds."""
    values = toy_config(data, run).model_dump(mode="json")["streams"]
    captions = {"kind": "captioning", **SMALL_DECODER}
    values["image-text"]["objectives"]["captions"] = captions | {"weight": 2.0}
    values["audio-text"]["objectives"]["captions"] = captions | {"media": "audio"}
    return toy_config(data, run, streams=values, **sections)
