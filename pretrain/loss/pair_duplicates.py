"""Pairs of the global batch that share a caption or media: found by key, in any part of the matrix.

Rows i and j are duplicates where any of their keys is equal. Then media i also fits caption j, and
media j caption i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class PairDuplicates:
    """Which of N pairs are duplicates of one another."""

    def __init__(self, keys: Sequence[Tensor]) -> None:
        """
        Args:
            keys: each int64 [N]; equal keys, equal content.
        """
        self.keys = list(keys)
        self.num_alike = num_sharing_a_key(self.keys)  # int64 [N], itself counted
        self.exist = bool((self.num_alike > 1).any())

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """(row, column) of duplicates in a part of the [N, N] matrix, counted from its corner.

        A pair is no duplicate of itself. None where there are none.
        """
        if not self.exist:
            return None
        media = (self.num_alike[rows] > 1).nonzero().squeeze(1)
        text = (self.num_alike[columns] > 1).nonzero().squeeze(1)
        is_alike = torch.zeros(len(media), len(text), dtype=torch.bool, device=media.device)
        for key in self.keys:
            is_alike |= key[rows][media][:, None] == key[columns][text]
        is_alike &= (media + rows.start)[:, None] != text + columns.start
        row, column = is_alike.nonzero(as_tuple=True)
        return (media[row], text[column]) if len(row) else None


def num_sharing_a_key(keys: Sequence[Tensor]) -> Tensor:
    """int64 [N] how many pairs share at least one of one or two keys with each, itself counted."""
    if len(keys) == 1:
        return _num_equal(keys[0])
    first, second = keys
    both = torch.stack([first, second], dim=1)  # [N, 2]
    return _num_equal(first) + _num_equal(second) - _num_equal(both)


def _num_equal(key: Tensor) -> Tensor:
    _, group, sizes = key.unique(dim=0, return_inverse=True, return_counts=True)
    return sizes[group]
