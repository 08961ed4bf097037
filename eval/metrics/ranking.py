"""Where the right answer of each query stands in a ranking, with ties broken at chance.

All metrics derive from three counts per query (`QueryRanks`). Ties matter: a model that gives every
pair the same score must score what guessing scores, never 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryRanks:
    """What stands above and level with each query's best right answer; arrays are int64 [Q]."""

    num_above: np.ndarray  # wrong answers that score higher
    num_tied: np.ndarray  # wrong answers that score the same
    num_tied_relevant: np.ndarray  # right answers that score the same, the best one included
    gallery_size: int

    def hits_at(self, k: int) -> np.ndarray:
        """Probability that a right answer is among the first k when ties are broken at random.

        0 or 1 where there is no tie. A k above the gallery's size counts as the gallery's size.

        Returns:
            [Q] float64.
        """
        # Of the first k ranks, those above the tie are taken. The rest are drawn from the tied
        # answers without replacement; the query misses if all drawn are wrong (hypergeometric).
        num_drawn = np.maximum(min(k, self.gallery_size) - self.num_above, 0)
        misses = np.ones(len(self.num_above))
        for right in range(1, int(self.num_tied_relevant.max(initial=0)) + 1):
            left_out = np.maximum(self.num_tied - num_drawn + right, 0) / (self.num_tied + right)
            misses = np.where(right <= self.num_tied_relevant, misses * left_out, misses)
        return 1 - misses

    def first_ranks(self) -> np.ndarray:
        """Expected rank of the first right answer, counted from 1, ties broken at random.

        Returns:
            [Q] float64.
        """
        return 1 + self.num_above + self.num_tied / (self.num_tied_relevant + 1)


def chance_ranks(num_relevant: np.ndarray, *, gallery_size: int) -> QueryRanks:
    """The ranks of a model that knows nothing: every answer is level with every other.

    Args:
        num_relevant: [Q] right answers of each query in the gallery.
        gallery_size: answers to choose from.
    """
    num_relevant = np.asarray(num_relevant, dtype=np.int64)
    return QueryRanks(
        num_above=np.zeros_like(num_relevant),
        num_tied=gallery_size - num_relevant,
        num_tied_relevant=num_relevant,
        gallery_size=gallery_size,
    )


def median_rank_at_chance(ranks: QueryRanks) -> int:
    """Smallest k at which a random ranking (see `chance_ranks`) finds half of the queries."""
    low, high = 1, ranks.gallery_size
    while low < high:
        middle = (low + high) // 2
        # 1e-12: half must count as half after rounding
        if ranks.hits_at(middle).mean() >= 0.5 - 1e-12:
            high = middle
        else:
            low = middle + 1
    return low


def cosine_scores(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosine similarities of all pairs, equal for equal pairs whatever the shape of the tile.

    A float32 product of the same two vectors differs in its last bit between tiles of different
    shapes, which would break ties by place. The products are taken in float64 and then rounded.

    Args:
        queries: [rows, D], L2-normalised.
        gallery: [columns, D], L2-normalised.

    Returns:
        [rows, columns] float32.
    """
    return (queries.double() @ gallery.double().T).float()


def check_finite(embeddings: Tensor, *, name: str) -> None:
    """
    Raises:
        ValueError: a value is NaN or infinite, which every comparison would count as a loss.
    """
    is_finite = torch.cat([torch.isfinite(rows).all(dim=-1) for rows in embeddings.split(4096)])
    if not bool(is_finite.all()):
        rows = torch.nonzero(~is_finite).flatten()
        raise ValueError(
            f"{name}: {len(rows)} of {len(embeddings)} embeddings hold NaN or infinity, the first "
            f"in row {int(rows[0])}; the checkpoint has diverged or its input is damaged"
        )
