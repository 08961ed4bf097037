"""CLIP's two towers: names in open_clip, transformers and timm.

The mathematics is the same. open_clip joins query, key and value, transformers splits them; and
open_clip's projections are stored transposed.
"""

from __future__ import annotations

import re

import torch

from pretrain.warm_start.weights import Weight, Weights

_BLOCK_TO_TRANSFORMERS = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_BLOCK_FROM_TRANSFORMERS = {new: old for old, new in _BLOCK_TO_TRANSFORMERS.items()}
# Outside of the blocks; of the image tower, then of the text tower.
_TO_TRANSFORMERS = {
    "class_embedding": "embeddings.class_embedding",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
    "positional_embedding": "embeddings.position_embedding.weight",
    "token_embedding.weight": "embeddings.token_embedding.weight",
    "ln_final.weight": "final_layer_norm.weight",
    "ln_final.bias": "final_layer_norm.bias",
}
_FROM_TRANSFORMERS = {new: old for old, new in _TO_TRANSFORMERS.items()}
_PROJECTIONS = {"image": "proj", "text": "text_projection"}  # [W, D] in open_clip
_PROJECTION = "projection.0.weight"  # [D, W]
_OPEN_CLIP_BLOCK = re.compile(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)")
_TRANSFORMERS_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_JOINT = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")
_PARTS = ("q_proj", "k_proj", "v_proj")
_TO_TIMM = {
    "conv1.": "patch_embed.proj.",
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "transformer.resblocks.": "blocks.",
    "ln_pre.": "norm_pre.",
    "ln_post.": "norm.",
    "ln_1.": "norm1.",
    "ln_2.": "norm2.",
    "attn.in_proj_": "attn.qkv.",
    "attn.out_proj.": "attn.proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_LEADING_AXES = {"cls_token": 2, "pos_embed": 1}  # of size 1, in timm alone


def is_clip_of_open_clip(weights: Weights) -> bool:
    """Returns whether a tower is one of CLIP's transformers as open_clip builds them."""
    return any(name.startswith("transformer.resblocks.") for name in weights)


def is_clip_of_transformers(weights: Weights) -> bool:
    """Returns whether a tower is one of CLIP's as transformers builds them, and not SigLIP's."""
    return "pre_layrnorm.weight" in weights or (
        "final_layer_norm.weight" in weights and "head.weight" not in weights
    )


def to_transformers(weights: Weights, *, kind: str) -> Weights:
    """Renames and splits the weights of open_clip's CLIP tower as transformers does."""
    found: Weights = {}
    for name, weight in weights.items():
        if joint := _JOINT.fullmatch(name):
            for part, tensor in zip(_PARTS, weight.tensor.chunk(3), strict=True):
                layer = f"encoder.layers.{joint[1]}.self_attn.{part}.{joint[2]}"
                found[layer] = Weight(weight.names, tensor)
        elif (block := _OPEN_CLIP_BLOCK.fullmatch(name)) and block[2] in _BLOCK_TO_TRANSFORMERS:
            layer = f"encoder.layers.{block[1]}.{_BLOCK_TO_TRANSFORMERS[block[2]]}.{block[3]}"
            found[layer] = weight
        elif name == _PROJECTIONS.get(kind):
            found[_PROJECTION] = Weight(weight.names, weight.tensor.T.contiguous())
        else:
            found[_TO_TRANSFORMERS.get(name, name)] = weight
    return found


def from_transformers(weights: Weights, *, kind: str) -> Weights:
    """Renames and joins the weights of transformers' CLIP tower as open_clip does."""
    found: Weights = {}
    parts: dict[str, dict[str, Weight]] = {}
    for name, weight in weights.items():
        block = _TRANSFORMERS_BLOCK.fullmatch(name)
        if block and block[2].removeprefix("self_attn.") in _PARTS:
            joint = f"transformer.resblocks.{block[1]}.attn.in_proj_{block[3]}"
            parts.setdefault(joint, {})[block[2].removeprefix("self_attn.")] = weight
        elif block and block[2] in _BLOCK_FROM_TRANSFORMERS:
            inner = _BLOCK_FROM_TRANSFORMERS[block[2]]
            found[f"transformer.resblocks.{block[1]}.{inner}.{block[3]}"] = weight
        elif name == _PROJECTION and kind in _PROJECTIONS:
            found[_PROJECTIONS[kind]] = Weight(weight.names, weight.tensor.T.contiguous())
        else:
            found[_FROM_TRANSFORMERS.get(name, name)] = weight
    for joint, by_part in parts.items():
        if by_part.keys() != set(_PARTS):  # a damaged source: its tensors will be unused
            found |= {f"{joint}.{part}": weight for part, weight in by_part.items()}
            continue
        ordered = [by_part[part] for part in _PARTS]
        names = tuple(name for weight in ordered for name in weight.names)
        found[joint] = Weight(names, torch.cat([weight.tensor for weight in ordered]))
    return found


def to_timm(weights: Weights) -> Weights:
    """Renames the weights of open_clip's CLIP image tower as timm's Vision Transformer does."""
    found: Weights = {}
    for name, weight in weights.items():
        if name == _PROJECTIONS["image"]:
            found[_PROJECTION] = Weight(weight.names, weight.tensor.T.contiguous())
            continue
        new = name
        for old, replacement in _TO_TIMM.items():
            new = new.replace(old, replacement)
        shape = (1,) * _LEADING_AXES.get(new, 0) + tuple(weight.tensor.shape)
        found[new] = Weight(weight.names, weight.tensor.reshape(shape))
    return found
