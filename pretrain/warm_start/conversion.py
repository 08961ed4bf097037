"""Weights of one library under the names of another, where both compute the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection

from data_prep.errors import InputError
from pretrain.warm_start.clip_names import (
    from_transformers,
    is_clip_of_open_clip,
    is_clip_of_transformers,
    to_timm,
    to_transformers,
)
from pretrain.warm_start.layouts import Form
from pretrain.warm_start.weights import Weights, renamed

_TRUNK = "trunk."  # of open_clip's image towers that timm builds
_TRUNK_PROJECTIONS = {
    "head.proj.": "projection.0.",
    "head.mlp.fc1.": "projection.0.",
    "head.mlp.fc2.": "projection.1.",
}
# open_clip's text towers that transformers builds
_HF_TEXT = "transformer."
_HF_TEXT_PROJECTIONS = {
    "proj.0.": "projection.0.",
    "proj.2.": "projection.1.",
    "proj.": "projection.0.",
}
# Names of layer norms in old files of transformers.
_OLD_NORMS = {".LayerNorm.gamma": ".LayerNorm.weight", ".LayerNorm.beta": ".LayerNorm.bias"}
Convert = Callable[[Weights, str, Collection[str]], Weights]


def convert(
    weights: Weights, *, form: Form, library: str, kind: str, names: Collection[str]
) -> Weights:
    """Renames a tower's weights to the names of the library that builds the tower.

    Args:
        weights: weights of one tower of the source.
        form: naming of the source.
        library: library of the tower, "timm", "open_clip" or "transformers".
        kind: kind of tower in the source.
        names: names of the tower's tensors, without a prefix for the backbone.

    Raises:
        InputError: if the library has no counterpart of such weights.
    """
    if form == library:
        return weights
    if (form, library) not in _CONVERSIONS:
        raise InputError(
            f"weights of {form} have no counterpart in a tower of {library}; use library: {form}"
        )
    return _CONVERSIONS[form, library](weights, kind, names)


def _open_clip_to_timm(weights: Weights, kind: str, names: Collection[str]) -> Weights:
    if is_clip_of_open_clip(weights):
        return to_timm(weights)
    return _with_prefixes(weights, {_TRUNK: "", **_TRUNK_PROJECTIONS})


def _open_clip_to_transformers(weights: Weights, kind: str, names: Collection[str]) -> Weights:
    if is_clip_of_open_clip(weights):
        return to_transformers(weights, kind=kind)
    return _with_prefixes(weights, {_HF_TEXT: "", **_HF_TEXT_PROJECTIONS})


def _transformers_to_open_clip(weights: Weights, kind: str, names: Collection[str]) -> Weights:
    if is_clip_of_transformers(weights):
        return from_transformers(weights, kind=kind)
    raise InputError(
        "of the models of transformers, only CLIP's towers have a counterpart in open_clip; use "
        "library: transformers"
    )


def _transformers_to_timm(weights: Weights, kind: str, names: Collection[str]) -> Weights:
    if kind == "image" and is_clip_of_transformers(weights):
        return to_timm(from_transformers(weights, kind=kind))
    raise InputError(
        "of the models of transformers, only CLIP's image tower has a counterpart in timm; use "
        "library: transformers"
    )


def _single_to_open_clip(weights: Weights, kind: str, names: Collection[str]) -> Weights:
    if not weights.keys() & set(names) and any(name.startswith(_TRUNK) for name in names):
        return renamed(weights, {name: f"{_TRUNK}{name}" for name in weights})
    return weights


def _single_to_transformers(weights: Weights, kind: str, names: Collection[str]) -> Weights:
    """Removes the prefix of the model in a file with a head, such as "bert."."""
    new_norms = {}
    for name in weights:
        for old, new in _OLD_NORMS.items():
            if name.endswith(old):
                new_norms[name] = name.removesuffix(old) + new
    weights = renamed(weights, new_norms)
    prefixes = Counter(
        prefix
        for name in weights
        for prefix in _prefixes_of(name)
        if name.removeprefix(prefix) in names
    )
    prefixes[""] = sum(name in names for name in weights)
    best = max(prefixes, key=lambda prefix: prefixes[prefix])
    return _with_prefixes(weights, {best: ""}) if best else weights


def _prefixes_of(name: str) -> list[str]:
    """The first component of a name, and the first two, with their dots"""
    components = name.split(".")
    return [".".join(components[:n]) + "." for n in (1, 2) if n < len(components)]


def _with_prefixes(weights: Weights, prefixes: dict[str, str]) -> Weights:
    """Replaces the first prefix that fits each name; other names are kept."""
    new_names = {}
    for name in weights:
        found = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if found is not None:
            new_names[name] = prefixes[found] + name.removeprefix(found)
    return renamed(weights, new_names)


def _unchanged(weights: Weights, kind: str, names: Collection[str]) -> Weights:
    return weights


_CONVERSIONS: dict[tuple[str, str], Convert] = {
    **{("isopair", library): _unchanged for library in ("timm", "open_clip", "transformers")},
    ("open_clip", "timm"): _open_clip_to_timm,
    ("open_clip", "transformers"): _open_clip_to_transformers,
    ("transformers", "open_clip"): _transformers_to_open_clip,
    ("transformers", "timm"): _transformers_to_timm,
    ("single", "open_clip"): _single_to_open_clip,
    ("single", "timm"): _unchanged,
    ("single", "transformers"): _single_to_transformers,
}
