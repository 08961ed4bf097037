"""LAION-CLAP's checkpoints in the names of transformers' ClapModel."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pretrain.warm_start.weights import Weight, Weights

# Names in LAION's HTSAT -> names in ClapAudioModel, in this order.
_AUDIO_NAMES = (
    ("attn.", "attention.self."),
    ("self.proj.", "output.dense."),
    ("mlp.fc1.", "intermediate.dense."),
    ("mlp.fc2.", "output.dense."),
    ("norm1.", "layernorm_before."),
    ("norm2.", "layernorm_after."),
    ("bn0.", "batch_norm."),
)
_PROJECTION = re.compile(r"(audio|text)_projection\.([02])\.(weight|bias)")
_LINEAR = {"0": "linear1", "2": "linear2"}
_QKV = re.compile(r"(.*\.)qkv(\.(?:weight|bias))")


def is_laion_clap(names: Iterable[str]) -> bool:
    """Returns whether tensors are named as in LAION-CLAP."""
    return any(name.startswith(("audio_branch.", "text_branch.")) for name in names)


def to_transformers_names(weights: Weights) -> Weights:
    """Renames the tensors that ClapModel has, and splits the joint query, key and value.

    Tensors without a counterpart, such as the classifier of sounds, keep their names.
    """
    found: Weights = {}
    for name, weight in weights.items():
        new = _renamed(name)
        joint = _QKV.fullmatch(new)
        if joint is None:
            found[new] = weight
            continue
        for part, tensor in zip(("query", "key", "value"), weight.tensor.chunk(3), strict=True):
            found[f"{joint[1]}{part}{joint[2]}"] = Weight(weight.names, tensor)
    return found


def _renamed(name: str) -> str:
    first, _, rest = name.partition(".")
    if first == "text_branch":
        return f"text_model.{rest}"
    if first == "audio_branch":
        for old, new in _AUDIO_NAMES:
            # Whole components of the name: "attn." is not the end of "cross_attn.".
            rest = re.sub(rf"(^|\.){re.escape(old)}", rf"\g<1>{new}", rest)
        return f"audio_model.audio_encoder.{rest}"
    projection = _PROJECTION.fullmatch(name)
    if projection:
        return f"{projection[1]}_projection.{_LINEAR[projection[2]]}.{projection[3]}"
    return name
