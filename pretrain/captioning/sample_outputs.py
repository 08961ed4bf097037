"""Outputs of a module for samples that may lack some of its views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pretrain.captioning.tower_tokens import ViewTokens


def outputs_of_samples(
    module: nn.Module,
    views: Sequence[ViewTokens],
    masks: Sequence[Tensor | None],
    *,
    num_samples: int,
) -> Tensor:
    """Computes a module for the samples that have all views.

    If none has, it is computed for one row and nothing is taken, so that its parameters still
    receive a gradient, of zero.

    Args:
        module: maps `ViewTokens` of [P, ...] to [P, K].
        views: tokens of each view, for the samples that have it; one row if none has.
        masks: bool [B] on the CPU, which samples have a view; None if none can lack it.
        num_samples: B.

    Returns:
        [B, K], zero for samples that lack a view.
    """
    if all(mask is None for mask in masks):  # plans have no values that could be compared
        return module(*views)[:num_samples]
    takes_part = torch.ones(num_samples, dtype=torch.bool)
    for mask in masks:
        takes_part &= True if mask is None else mask
    outputs = module(
        *(_of_rows(view, takes_part, mask) for view, mask in zip(views, masks, strict=True))
    )
    if takes_part.all():
        return outputs[:num_samples]
    rows = takes_part.nonzero()[:, 0].to(outputs.device, non_blocking=True)
    zeros = outputs.new_zeros(num_samples, outputs.shape[1])
    return zeros.index_copy(0, rows, outputs[: len(rows)])


def _of_rows(view: ViewTokens, takes_part: Tensor, mask: Tensor | None) -> ViewTokens:
    """The tokens of the samples that take part; those of one row if none does"""
    if takes_part.all():
        return view
    own = takes_part if mask is None else takes_part[mask]
    rows = own.nonzero()[:, 0] if own.any() else torch.zeros(1, dtype=torch.int64)
    rows = rows.to(view.tokens.device, non_blocking=True)
    return ViewTokens(view.tokens[rows], None if view.ids is None else view.ids[rows])
