"""Dropout of attention weights, which is drawn inside attention and not per sample, set to 0."""

from __future__ import annotations

from typing import Any

from torch import nn

# Names in the configs of transformers.
RATES = (
    "attention_probs_dropout_prob",
    "attention_dropout",
    "attention_dropout_prob",
    "attn_dropout",
    "attn_pdrop",
)


def attention_rates(settings: Any) -> dict[str, float]:
    """Returns {name: 0.0} for the rates of a transformers config that are not zero."""
    return {name: 0.0 for name in RATES if getattr(settings, name, None)}


def turn_off_attention_dropout(settings: Any, *, is_off: bool) -> None:
    """Sets the rates of a transformers config to 0, in place, if the tower's config says so."""
    if is_off:
        for name, rate in attention_rates(settings).items():
            setattr(settings, name, rate)


def zero_attention_dropout(backbone: nn.Module) -> None:
    """Sets the rates that no config of transformers names to 0, in place.

    T5's attention has a functional rate, and timm's a layer `attn_drop`. Swin V2's position bias
    (timm) is a network with dropout.
    """
    for name, layer in backbone.named_modules():
        parts = name.split(".")
        is_attention = "Attention" in type(layer).__name__
        if is_attention and isinstance(getattr(layer, "dropout", None), float):
            layer.dropout = 0.0
        if isinstance(layer, nn.Dropout) and ("meta_mlp" in parts or parts[-1] == "attn_drop"):
            layer.p = 0.0
