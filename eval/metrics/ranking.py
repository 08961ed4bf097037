"""Rank of the first relevant candidate of each query, with ties broken at random.

All metrics derive from three counts per query (`QueryRanks`). Ties matter: a model that gives every
pair the same score must be measured at exactly chance, not at 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryRanks:
    """Number of competitors of each query's best relevant candidate; arrays are int64 [Q]."""

    num_above: np.ndarray  # irrelevant candidates that score higher
    num_tied: np.ndarray  # irrelevant candidates that score the same
    num_tied_relevant: np.ndarray  # relevant candidates that score the same, including the best
    gallery_size: int

    def hits_at(self, k: int) -> np.ndarray:
        """Computes the probability that a relevant candidate is among the first k.

        It is 0 or 1 without ties. k is clipped to the gallery size.

        Returns:
            [Q] float64.
        """
        # The first num_above of the k ranks are taken by irrelevant candidates. The rest are drawn
        # from the tied candidates without replacement, and the query misses if all of those are
        # irrelevant (hypergeometric).
        num_drawn = np.maximum(min(k, self.gallery_size) - self.num_above, 0)
        misses = np.ones(len(self.num_above))
        for relevant in range(1, int(self.num_tied_relevant.max(initial=0)) + 1):
            num_left = self.num_tied + relevant
            left_out = np.maximum(num_left - num_drawn, 0) / num_left
            misses = np.where(relevant <= self.num_tied_relevant, misses * left_out, misses)
        return 1 - misses

    def first_ranks(self) -> np.ndarray:
        """Computes the expected rank, from 1, of the first relevant candidate.

        Returns:
            [Q] float64.
        """
        return 1 + self.num_above + self.num_tied / (self.num_tied_relevant + 1)


def chance_ranks(num_relevant: np.ndarray, *, gallery_size: int) -> QueryRanks:
    """Returns the ranks of a chance-level model, which scores all candidates equally.

    Args:
        num_relevant: [Q] relevant candidates of each query.
        gallery_size: number of candidates.
    """
    num_relevant = np.asarray(num_relevant, dtype=np.int64)
    return QueryRanks(
        num_above=np.zeros_like(num_relevant),
        num_tied=gallery_size - num_relevant,
        num_tied_relevant=num_relevant,
        gallery_size=gallery_size,
    )


def median_rank_at_chance(ranks: QueryRanks) -> int:
    """Returns the smallest k at which chance-level ranks hit half of the queries."""
    low, high = 1, ranks.gallery_size
    while low < high:
        middle = (low + high) // 2
        # 1e-12 tolerates rounding errors of an exact half
        if ranks.hits_at(middle).mean() >= 0.5 - 1e-12:
            high = middle
        else:
            low = middle + 1
    return low


def cosine_scores(queries: Tensor, gallery: Tensor) -> Tensor:
    """Computes the cosine similarities of all pairs.

    Equal pairs get bitwise equal scores for any tile shape. A float32 product of the same two
    vectors may differ in its last bit between tiles of different shapes, which would break ties by
    position. The products are therefore computed in float64 and then rounded.

    Args:
        queries: [rows, D], L2-normalised.
        gallery: [columns, D], L2-normalised.

    Returns:
        [rows, columns] float32.
    """
    return (queries.double() @ gallery.double().T).float()


def check_finite(embeddings: Tensor, *, name: str) -> None:
    """Checks that embeddings are finite; NaN would lose every comparison without notice.

    Raises:
        ValueError: if a value is not finite.
    """
    is_finite = torch.cat([torch.isfinite(rows).all(dim=-1) for rows in embeddings.split(4096)])
    if not bool(is_finite.all()):
        rows = torch.nonzero(~is_finite).flatten()
        raise ValueError(
            f"{name}: {len(rows)} of {len(embeddings)} embeddings contain NaN or infinity, first "
            f"in row {int(rows[0])}; the checkpoint has diverged or its input is damaged"
        )
