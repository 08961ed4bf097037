"""Weights of another input size: positions and patches are interpolated by timm's functions.

timm's own filter does it for towers of timm. For others, the tables below say which tensors are
positions on a grid, patches, or positions in a caption. The latter are cut, or kept and extended:
new positions keep the random values of a new model.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from pretrain.warm_start.weights import Weight, Weights

_CAPTION_POSITIONS = re.compile(
    r"(.*\.)?(positional_embedding|position_embeddings?\.weight|embed_positions\.weight)"
)
# [1 +] P + prefixes positions; name -> names of the prefix tokens in the same tower
_GRIDS = {
    "positional_embedding": ("class_embedding",),
    "embeddings.position_embedding.weight": ("embeddings.class_embedding",),
    "embeddings.position_embeddings": (
        "embeddings.cls_token",
        "embeddings.distillation_token",
    ),
}
_PATCHES = (
    "conv1.weight",
    "embeddings.patch_embedding.weight",
    "embeddings.patch_embeddings.projection.weight",
)


Grid = tuple[int, int]


def grid_of(backbone: nn.Module) -> Grid | None:
    """Returns the rows and columns of a tower's patches if they are no square, as of sounds.

    Args:
        backbone: backbone of a tower.
    """
    config = getattr(getattr(backbone, "backbone", None), "config", None)
    if getattr(config, "model_type", None) != "audio-spectrogram-transformer":
        return None
    side = config.patch_size
    return (
        (config.num_mel_bins - side) // config.frequency_stride + 1,
        (config.max_length - side) // config.time_stride + 1,
    )


def resample(
    name: str,
    tensor: Tensor,
    own: Tensor,
    *,
    names: Collection[str],
    grid: Grid | None = None,
) -> Tensor | None:
    """Resizes a tensor of a source to the shape that it has in a tower.

    Args:
        name: name of the tensor in the tower, without a prefix for the backbone.
        tensor: tensor of the source.
        own: tensor of the new tower, of the wanted shape.
        names: names of all tensors of the tower.
        grid: result of `grid_of`; the source has as many rows.

    Returns:
        The tensor in the wanted shape, or None if it depends on no input size.
    """
    is_text = not any(patch in names for patch in _PATCHES)
    if name in _GRIDS and not is_text:
        num_prefixes = sum(prefix in names for prefix in _GRIDS[name])
        return _resample_grid(tensor, own, num_prefixes=num_prefixes, grid=grid)
    if name in _PATCHES:
        return _resample_patches(tensor, own)
    if _CAPTION_POSITIONS.fullmatch(name):
        return _cut_or_extend(tensor, own)
    return None


def _resample_grid(
    tensor: Tensor, own: Tensor, *, num_prefixes: int, grid: Grid | None
) -> Tensor | None:
    from timm.layers import resample_abs_pos_embed

    if tensor.shape[-1] != own.shape[-1]:
        return None
    num_patches = [each.shape[-2] - num_prefixes for each in (tensor, own)]
    rows = [math.isqrt(number) for number in num_patches] if grid is None else [grid[0]] * 2
    sizes = [(row, number // row) for row, number in zip(rows, num_patches, strict=True) if row]
    if [height * width for height, width in sizes] != num_patches:
        return None
    if grid is None and any(height != width for height, width in sizes):
        return None
    positions = tensor.reshape(1, *tensor.shape[-2:])
    positions = resample_abs_pos_embed(
        positions, list(sizes[1]), old_size=list(sizes[0]), num_prefix_tokens=num_prefixes
    )
    return positions.reshape(own.shape)


def _resample_patches(tensor: Tensor, own: Tensor) -> Tensor | None:
    """[W, C, side, side], or [W, side * side * C] of NaFlex towers"""
    from timm.layers import resample_patch_embed

    if tensor.ndim == own.ndim == 4 and tensor.shape[:2] == own.shape[:2]:
        return resample_patch_embed(tensor, list(own.shape[2:]))
    if not (tensor.ndim == own.ndim == 2 and len(tensor) == len(own)):
        return None
    sides = [math.isqrt(each.shape[1] // 3) for each in (tensor, own)]
    if any(3 * side**2 != e.shape[1] for side, e in zip(sides, (tensor, own), strict=True)):
        return None
    kernels = tensor.reshape(len(tensor), sides[0], sides[0], 3).permute(0, 3, 1, 2)
    kernels = resample_patch_embed(kernels, [sides[1], sides[1]])
    return kernels.permute(0, 2, 3, 1).reshape(own.shape)


def _cut_or_extend(tensor: Tensor, own: Tensor) -> Tensor | None:
    """[L, W]: the first positions of the source, and the tower's own for those that follow"""
    if tensor.ndim != 2 or own.ndim != 2 or tensor.shape[1] != own.shape[1]:
        return None
    return torch.cat([tensor.to(own.dtype)[: len(own)], own[len(tensor) :]])


# ----------------------------------------------------------------------------------------- timm


def filter_by_timm(weights: Weights, model: nn.Module) -> Weights:
    """Converts weights by the filter of a timm model, as timm does before it loads them.

    It renames the tensors of other releases of the model, and resamples positions and patches.

    Args:
        weights: weights of one tower.
        model: model of timm.
    """
    tensors = {name: weight.tensor for name, weight in weights.items()}
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    converted = tensors if convert is None else convert(dict(tensors), model)
    converted = _with_channels(dict(converted), model)
    found: Weights = {}
    for name, tensor in converted.items():
        source = name if name in weights else _holder_of(tensor, tensors)
        found[name] = Weight(() if source is None else weights[source].names, tensor)
    return found | _dropped(weights, found)


def _dropped(weights: Weights, found: Weights) -> Weights:
    """The weights that the filter left out; unused, unless it computed another one from them."""
    used = {name for weight in found.values() for name in weight.names}
    left = {n: w for n, w in weights.items() if n not in found and not used & set(w.names)}
    nameless = [name for name, weight in found.items() if not weight.names]
    if nameless:
        names = tuple(name for weight in left.values() for name in weight.names)
        for name in nameless:
            found[name] = Weight(names, found[name].tensor)
        return {}
    return left


def _holder_of(tensor: Tensor, tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the tensor that holds the memory of another one"""
    for name, each in tensors.items():
        first = each.data_ptr()
        if tensor.numel() and first <= tensor.data_ptr() < first + each.nbytes:
            return name
    return None


def _with_channels(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapts the first convolutions to another number of channels: RGB kernels to one channel."""
    from timm.models import adapt_input_conv

    own = dict(model.named_parameters())
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    for name in (names,) if isinstance(names, str) else names:
        key = f"{name}.weight"
        shapes = [each[key].shape for each in (tensors, own) if key in each]
        if [len(shape) for shape in shapes] == [4, 4] and shapes[0][1] == 3 != shapes[1][1]:
            tensors[key] = adapt_input_conv(shapes[1][1], tensors[key])
    return tensors
