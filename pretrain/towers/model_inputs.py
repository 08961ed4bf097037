"""Inputs of transformers' media models, and sizes for models that are built for one size.

Most vision models take pixel_values, [B, 3, H, Wd]. The others, and sizes that a model's config
must name, are listed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

ModelInputs = dict[str, Tensor | None]


def _patches(pixels: Tensor, config: Any) -> ModelInputs:
    """Inputs of a NaFlex model for images of one size: all patches, none of them padding."""
    side = config.patch_size
    num_rows, num_columns = pixels.shape[2] // side, pixels.shape[3] // side
    pixels = pixels[:, :, : num_rows * side, : num_columns * side]
    patches = pixels.unflatten(3, (num_columns, side)).unflatten(2, (num_rows, side))
    # [B, C, rows, side, columns, side] -> [B, rows, columns, side, side, C] -> [B, P, side^2 C]
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    # On the CPU: the model reads the sizes in Python.
    shapes = torch.tensor([[num_rows, num_columns]], device="cpu").expand(len(pixels), 2)
    return {"pixel_values": patches, "pixel_attention_mask": None, "spatial_shapes": shapes}


# Model type -> inputs from pixels [B, 3, H, Wd] or mel [B, 1, F, S], and the model's config.
_INPUTS: Mapping[str, Callable[[Tensor, Any], ModelInputs]] = {
    "siglip2_vision_model": _patches,
    "audio-spectrogram-transformer": lambda mel, _: {"input_values": mel[:, 0].transpose(1, 2)},
    "clap_audio_model": lambda mel, _: {"input_features": mel.transpose(2, 3)},
    "whisper": lambda mel, _: {"input_features": mel[:, 0]},
}


def model_inputs(pixels_or_mel: Tensor, config: Any) -> ModelInputs:
    """Returns the keyword arguments of a model.

    Args:
        pixels_or_mel: pixels [B, 3, H, Wd] or log-mel spectrograms [B, 1, F, S].
        config: config of the transformers model.
    """
    convert = _INPUTS.get(config.model_type)
    return {"pixel_values": pixels_or_mel} if convert is None else convert(pixels_or_mel, config)


# Model type -> options that an input of two sizes (H, Wd or F, S) requires.
_SIZES: Mapping[str, Callable[[int, int], dict[str, int]]] = {
    **dict.fromkeys(
        (
            *("aimv2_vision_model", "clip_vision_model", "deit", "ijepa"),
            *("metaclip_2_vision_model", "siglip_vision_model", "vit"),
        ),
        lambda height, width: {"image_size": height},
    ),
    "audio-spectrogram-transformer": lambda bins, frames: {
        "num_mel_bins": bins,
        "max_length": frames,
    },
    "clap_audio_model": lambda bins, frames: {"num_mel_bins": bins},
    "whisper": lambda bins, frames: {
        "num_mel_bins": bins,
        "max_source_positions": -(-frames // 2),  # its second convolution has a stride of 2
    },
}


def size_options(model_type: str, input_shape: tuple[int, int] | None) -> dict[str, int]:
    """Returns the options that fit a model built from scratch to its input.

    Args:
        model_type: model type of transformers.
        input_shape: (H, Wd) of images or (F, S) of spectrograms; None leaves the model's own.
    """
    if input_shape is None or model_type not in _SIZES:
        return {}
    return _SIZES[model_type](*input_shape)


# Options with which a model takes any size.
_ANY_SIZE = ("img_size", "dynamic_img_size", "strict_img_size")


def timm_size_options(
    name: str, options: dict[str, Any], input_shape: tuple[int, int] | None
) -> dict[str, tuple[int, int]]:
    """Returns {"img_size": ...} for a timm model of a fixed size that differs from its input's.

    Args:
        name: name of a timm model.
        options: options of the tower; those about sizes are left as they are.
        input_shape: (H, Wd) or (F, S); None leaves the model's own.
    """
    import timm

    if input_shape is None or any(option in options for option in _ANY_SIZE):
        return {}
    known = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if known is None or not known.fixed_input_size:
        return {}
    size = tuple(input_shape)
    return {} if size == tuple(known.input_size[1:]) else {"img_size": size}
