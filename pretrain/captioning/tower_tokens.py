"""Tokens of towers: outputs of a backbone before it pools them, for decoders that attend to them.

A backbone that gives tokens returns (features [B, W], tokens [B, P, W']) instead of the features
alone; W' may differ from W.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from data_prep.errors import InputError

_GIVES_TOKENS = "gives_tokens"  # attribute of backbones


class ViewTokens(NamedTuple):
    """Tokens of the tower of one view, for samples that have all views of an objective."""

    tokens: Tensor  # [B, P, W] of media or [B, L, W] of texts
    ids: Tensor | None = None  # int64 [B, L] token ids; texts only


def give_tokens(backbone: nn.Module, *, where: str) -> None:
    """Makes a backbone return its tokens, too.

    Args:
        backbone: backbone of a tower, changed in place.
        where: config key of the tower, for messages.

    Raises:
        InputError: if it has none.
    """
    if hasattr(backbone, "output_tokens"):  # transformers of open_clip
        backbone.output_tokens = True
    elif hasattr(backbone, "trunk") and hasattr(backbone.trunk, "forward_features"):
        # Calls of modules stay calls, by which ZeRO gathers partitioned parameters.
        backbone.trunk.forward = MethodType(_forward_of_timm, backbone.trunk)
        backbone.forward = MethodType(_forward_of_trunk, backbone)
    elif hasattr(backbone, "forward_features") and hasattr(backbone, "forward_head"):
        backbone.forward = MethodType(_forward_of_timm, backbone)
    elif not hasattr(backbone, _GIVES_TOKENS):
        raise InputError(
            f"{where}: expected a tower with tokens, which a decoder of captions attends to; "
            f"{type(backbone).__name__} has none; choose a transformer or convolutional network of "
            "timm, open_clip or transformers"
        )
    setattr(backbone, _GIVES_TOKENS, True)


def pooled(backbone: nn.Module, output: Any) -> Any:
    """Returns the features [B, W] of a backbone's output."""
    return output[0] if getattr(backbone, _GIVES_TOKENS, False) else output


def token_width(backbone: nn.Module, example: Tensor, *, where: str) -> int:
    """Determines the width of the tokens of a backbone.

    Args:
        backbone: backbone that gives tokens.
        example: [1, ...] input of the backbone.
        where: config key of the tower, for messages.

    Raises:
        InputError: if its tokens are not [B, P, W'].
    """
    was_training = backbone.training
    with torch.no_grad():
        tokens = backbone.eval()(example)[1]
    backbone.train(was_training)
    if tokens.ndim != 3:
        raise InputError(
            f"{where}: expected tokens [B, P, W] for a decoder of captions, found "
            f"{list(tokens.shape)}; choose another model"
        )
    return tokens.shape[-1]


def tokens_of_map(values: Tensor, *, has_channels_last: bool = False) -> Tensor:
    """Returns the tokens [B, P, W] of a feature map [B, W, H, Wd] or, channels last, [B, H, Wd, W].

    Values of other shapes are returned as they are.
    """
    if values.ndim != 4:
        return values
    if has_channels_last:
        return values.flatten(1, 2)  # [B, H, Wd, W] -> [B, P, W]
    return values.flatten(2).transpose(1, 2)  # [B, W, H, Wd] -> [B, P, W]


def _forward_of_timm(model: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    values = model.forward_features(inputs)
    is_last = str(getattr(model, "output_fmt", "NCHW")).upper().endswith("NHWC")
    return model.forward_head(values), tokens_of_map(values, has_channels_last=is_last)


def _forward_of_trunk(tower: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """The forward pass of open_clip's towers that timm builds."""
    features, tokens = tower.trunk(inputs)
    return tower.head(features), tokens
