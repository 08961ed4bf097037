"""Pooling of a tower's tokens to one vector per sample."""

from __future__ import annotations

import torch
from torch import Tensor


def pool_tokens(hidden: Tensor, mask: Tensor, *, pooling: str) -> Tensor:
    """Pools the tokens of each sample: [B, L, W] -> [B, W].

    Args:
        hidden: [B, L, W].
        mask: bool [B, L], false at padding. A sample without tokens is pooled to zeros by mean and
            max; `first` and `last` take its first position.
        pooling: "first" position, "last" token that is not padding, "mean" or "max" over tokens.
    """
    if pooling == "first":
        return hidden[:, 0]  # [B, L, W] -> [B, W]
    if pooling == "last":
        positions = torch.arange(hidden.shape[1], device=hidden.device)
        last = (mask * positions).amax(dim=1)  # [B, L] -> [B]
        return hidden.gather(1, last[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]
    if pooling == "max":
        kept = hidden.masked_fill(~mask[..., None], -torch.inf).amax(dim=1)  # [B, L, W] -> [B, W]
        return kept.masked_fill(~mask.any(dim=1)[:, None], 0.0)
    weights = mask[..., None].to(hidden.dtype)
    num_tokens = weights.sum(dim=1).clamp(min=1)
    return (hidden * weights).sum(dim=1) / num_tokens  # [B, L, W] -> [B, W]
