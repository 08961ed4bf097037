"""Projections from a backbone's width W to the joint width D."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def _linear(width: int, embed_dim: int) -> nn.Module:
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def _clap_mlp(width: int, embed_dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim))


def _open_clip_mlp(width: int, embed_dim: int) -> nn.Module:
    hidden = (width + embed_dim) // 2
    return nn.Sequential(
        nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, embed_dim, bias=False)
    )


_PROJECTIONS: dict[str, Callable[[int, int], nn.Module]] = {
    "linear": _linear,
    "mlp": _clap_mlp,
    "open_clip_mlp": _open_clip_mlp,
}


def build_projection(form: str, *, width: int, embed_dim: int) -> nn.Module:
    """Builds the projection of a tower, [B, W] -> [B, D].

    Args:
        form: "linear" (a matrix), "mlp" (LAION-CLAP's: two layers with biases, ReLU) or
            "open_clip_mlp" (that of open_clip's towers from transformers: no biases, GELU).
        width: W.
        embed_dim: D.
    """
    return _PROJECTIONS[form](width, embed_dim)
