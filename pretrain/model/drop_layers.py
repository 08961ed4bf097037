"""Replacement of a trained tower's dropout layers with layers that drop per sample.

Three checks guard against unexpected library code. A DropPath is replaced only if it behaves like
one. The input of each replaced layer must hold the rows of a sample next to each other. No other
layer may draw random numbers.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from data_prep.errors import InputError
from pretrain.model.sample_dropout import (
    SampleDrop,
    SampleDropout,
    SampleDropPath,
    SamplePatchDropout,
    TowerDropKeys,
)
from pretrain.settings.model import tower_key

# The variants of nn.Dropout that drop entire channels.
CHANNEL_DROPOUTS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
# Attributes in which layers of the three libraries store a probability of dropping.
DROP_RATES = (
    "p",
    "drop_rate",
    "drop_prob",
    "prob",
    "dropout",
    "attn_drop",
    "attention_dropout",
    "activation_dropout",
    "dropout_p",
    "layerdrop",
)
SUPPORTED_DROPPING = (
    "dropout layers (nn.Dropout), stochastic depth (DropPath) and patch dropout are supported; "
    "functional dropout is not: on attention weights (set attention_dropout: off in the tower's "
    "section), on entire layers (layerdrop), on a head or on activations (drop_rate, dropout, "
    "activation_dropout)"
)
# Beginning of a layer's class name -> the option that helps.
OTHER_RANDOMNESS = {
    "DINOv3ViTRope": "options: {pos_embed_rescale: null, pos_embed_shift: null, "
    "pos_embed_jitter: null}",
}


def replace_drop_layers(backbone: nn.Module, *, kind: str) -> TowerDropKeys:
    """Replaces all known dropout layers and returns the keys that their replacements share.

    Args:
        backbone: backbone of a trained tower; changed in place.
        kind: name of the tower; part of every key.

    Raises:
        InputError: if a dropout layer cannot be replaced.
    """
    drop_keys = TowerDropKeys()
    replaced: dict[int, SampleDrop | None] = {}
    for name, layer in list(backbone.named_modules(remove_duplicate=False)):
        if id(layer) not in replaced:
            replaced[id(layer)] = _sample_layer(layer, f"{kind}.{name}", drop_keys)
        if (new := replaced[id(layer)]) is not None:
            backbone.set_submodule(name, new.train(layer.training))
    return drop_keys


def sample_drops(backbone: nn.Module) -> list[SampleDrop]:
    """Lists the layers of a backbone that drop per sample."""
    return [layer for layer in backbone.modules() if isinstance(layer, SampleDrop)]


# ------------------------------------------------------------------------------------ replacing


def _sample_layer(layer: nn.Module, name: str, drop_keys: TowerDropKeys) -> SampleDrop | None:
    """The replacement of a layer; None if the layer drops nothing or is unknown.

    `refuse_other_randomness` detects unknown dropout layers.
    """
    from open_clip.transformer import PatchDropout as OpenClipPatchDropout
    from timm.layers import PatchDropout
    from timm.layers.patch_dropout import PatchDropoutWithIndices

    if type(layer) is nn.Dropout or type(layer) in CHANNEL_DROPOUTS:
        if _is_on(layer.p, name):
            is_by_channel = type(layer) in CHANNEL_DROPOUTS
            return SampleDropout(name, drop_keys, p=layer.p, drops_channels=is_by_channel)
    elif type(layer).__name__.endswith("DropPath") and hasattr(layer, "drop_prob"):
        if _is_on(layer.drop_prob or 0.0, name):
            return SampleDropPath(
                name,
                drop_keys,
                drop_prob=layer.drop_prob,
                scale_by_keep=_scales_by_keep(layer, name),
            )
    elif type(layer) in (PatchDropout, PatchDropoutWithIndices):
        if _is_on(layer.prob, name):
            return SamplePatchDropout(
                name,
                drop_keys,
                prob=layer.prob,
                num_prefix_tokens=layer.num_prefix_tokens,
                is_ordered=layer.ordered,
                returns_indices=type(layer) is PatchDropoutWithIndices,
            )
    elif type(layer) is OpenClipPatchDropout and _is_on(layer.prob, name):
        num_prefix = int(layer.exclude_first_token)
        return SamplePatchDropout(name, drop_keys, prob=layer.prob, num_prefix_tokens=num_prefix)
    return None


def _key_of(layer: str) -> str:
    """The config key of a layer's tower, followed by the name of the layer in it."""
    tower, dot, in_tower = layer.partition(".")
    return tower_key(tower) + dot + in_tower


def _is_on(rate: float, name: str) -> bool:
    if not 0 <= rate < 1:
        raise InputError(f"{_key_of(name)}: expected a probability from 0 to below 1, found {rate}")
    return rate > 0


def _scales_by_keep(layer: nn.Module, name: str) -> bool:
    """Whether a DropPath scales the rows that it keeps; determined by calling it on ones.

    Raises:
        InputError: if the layer does not drop entire rows, or scales them differently.
    """
    rate, was_training = layer.drop_prob, layer.training
    layer.drop_prob = 0.5
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        rows = layer.train()(torch.ones(64, 2, 3, device="cpu"))
    layer.drop_prob = rate
    layer.train(was_training)
    values = rows.unique().tolist()
    drops_rows = bool((rows == rows[:, :1, :1]).all())
    if not drops_rows or values not in ([0.0, 1.0], [0.0, 2.0]):
        raise InputError(
            f"{_key_of(name)}: expected a {type(layer).__name__} that drops entire rows and scales "
            f"them by 1 or 1 / (1 - rate), found {values[:4]} from ones at rate 0.5; set its rate "
            "to 0 in options"
        )
    return values == [0.0, 2.0]


# ------------------------------------------------------------------------------------- checks


@contextmanager
def refuse_other_randomness(backbone: nn.Module, *, where: str) -> Iterator[None]:
    """Checks that no layer draws from a random generator during a call of the backbone.

    Raises:
        InputError: if a layer draws random numbers.
    """
    random_layers: list[tuple[str, nn.Module]] = []
    states_before: list[Any] = []

    def before(layer: nn.Module, args: Any) -> None:
        states_before.append(_generator_states())

    def after(layer: nn.Module, args: Any, output: Any) -> None:
        # The hook of the innermost layer runs first.
        if states_before.pop() != _generator_states() and not random_layers:
            random_layers.append((names[id(layer)], layer))

    names = {id(layer): name for name, layer in backbone.named_modules()}
    hooks = [
        hook
        for layer in backbone.modules()
        for hook in (layer.register_forward_pre_hook(before), layer.register_forward_hook(after))
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    if random_layers:
        name, layer = random_layers[0]
        if not layer.training:
            raise InputError(
                f"{where}: layer {name or '(the backbone)'} ({type(layer).__name__}) draws random "
                "numbers in evaluation mode, too, so that the features of a frozen tower depend on "
                "which samples share a process; choose a model without it"
            )
        raise InputError(_refusal(name, layer, where=where))


def _generator_states() -> tuple[Any, ...]:
    numpy_state = np.random.get_state(legacy=False)["state"]
    return (
        torch.get_rng_state().numpy().tobytes(),
        repr(numpy_state["pos"]),
        numpy_state["key"].tobytes(),
        random.getstate(),
    )


def _refusal(name: str, layer: nn.Module, *, where: str) -> str:
    rates = {key: getattr(layer, key, None) for key in DROP_RATES}
    rates |= {f"{key}.p": layer.p for key, layer in layer.named_children() if hasattr(layer, "p")}
    found = [f"{key}={rate:g}" for key, rate in rates.items() if isinstance(rate, float) and rate]
    for beginning, help_with in OTHER_RANDOMNESS.items():
        if type(layer).__name__.startswith(beginning):
            return (
                f"{where}: layer {name} ({type(layer).__name__}) draws random numbers that depend "
                f"on which samples share a process; set {help_with}"
            )
    return (
        f"{where}: layer {name or '(the backbone)'} ({type(layer).__name__}"
        f"{'; rates: ' if found else ''}{', '.join(found)}) draws random numbers that depend on "
        f"which samples share a process; set its rate to 0 in options: {SUPPORTED_DROPPING}"
    )


@torch.no_grad()
def check_rows_of_samples(backbone: nn.Module, examples: Tensor, *, where: str) -> None:
    """Checks that each dropout layer receives the rows of a sample next to each other.

    Args:
        backbone: backbone in evaluation mode.
        examples: two different inputs.
        where: config key of the tower.

    Raises:
        InputError: if the rows of a sample are not adjacent, so that dropout depends on the batch.
    """
    if not sample_drops(backbone) or examples.is_meta:  # there are no values to compare
        return
    parameters = _without_zeros(backbone)
    first, second = (
        _inputs_of_drops(backbone, parameters, rows) for rows in (examples, examples[[1, 1]])
    )
    for name, calls in first.items():
        for a, b in zip(calls, second[name], strict=True):
            if not _only_first_half_differs(a, b):
                raise InputError(
                    f"{where}: layer {name.partition('.')[2]} drops from {list(a.shape)} for 2 "
                    "samples; expected the rows of a sample next to each other on the first axis; "
                    "set its rate to 0 in options, or attention_dropout: off"
                )


def _without_zeros(backbone: nn.Module) -> dict[str, Tensor]:
    """{name: random values} for parameters initialised to zero, which would mask later layers."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.02 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        for name, parameter in backbone.named_parameters()
        if not parameter.any()
    }


def _only_first_half_differs(a: Tensor, b: Tensor) -> bool:
    half, rest = divmod(len(a), 2)
    tolerance = 1e-6 * a.abs().max()
    is_same = ((a - b).abs() <= tolerance).reshape(len(a), -1).all(dim=1)
    return rest == 0 and not is_same[:half].all() and bool(is_same[half:].all())


def _inputs_of_drops(
    backbone: nn.Module, parameters: dict[str, Tensor], examples: Tensor
) -> dict[str, list[Tensor]]:
    """{name of a dropout layer: its inputs, one per call}"""
    inputs: dict[str, list[Tensor]] = {}

    def record(layer: SampleDrop, args: tuple[Tensor, ...]) -> None:
        inputs.setdefault(layer.name, []).append(args[0].clone())

    hooks = [layer.register_forward_pre_hook(record) for layer in sample_drops(backbone)]
    try:
        functional_call(backbone, parameters, (examples,))
    finally:
        for hook in hooks:
            hook.remove()
    return inputs
