"""Rank of the first relevant candidate of each query, with ties broken at random.

All metrics derive from three counts per query (`QueryRanks`). Ties matter: a model that gives every
pair the same score must score exactly chance, never 100 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryRanks:
    """Competitors of each query's best relevant candidate; arrays are int64 [Q]."""

    num_above: np.ndarray  # irrelevant candidates that score higher
    num_tied: np.ndarray  # irrelevant candidates that score the same
    num_tied_relevant: np.ndarray  # relevant candidates that score the same, including the best
    gallery_size: int

    def hits_at(self, k: int) -> np.ndarray:
        """Computes the probability that a relevant candidate is among the first k.

        It is 0 or 1 where there is no tie. A k above the gallery's size counts as the gallery's
        size.

        Returns:
            [Q] float64.
        """
        # Of the first k ranks, those above the tie are taken. The rest are drawn from the tied
        # candidates without replacement; the query misses if all drawn are irrelevant
        # (hypergeometric).
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
    """Returns the ranks of an uninformed model, which scores all candidates alike.

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
    """Finds the smallest k at which a random ranking (see `chance_ranks`) hits half the queries."""
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
    """Computes the cosine similarities of all pairs.

    Equal pairs get bitwise equal scores, whatever the shape of the tile. A float32 product of the
    same two vectors differs in its last bit between tiles of different shapes, which would break
    ties by position. The products are therefore computed in float64 and then rounded.

    Args:
        queries: [rows, D], L2-normalised.
        gallery: [columns, D], L2-normalised.

    Returns:
        [rows, columns] float32.
    """
    return (queries.double() @ gallery.double().T).float()


def check_finite(embeddings: Tensor, *, name: str) -> None:
    """Refuses embeddings with NaN or infinity, which every comparison would count as a loss.

    Raises:
        ValueError: a value is not finite.
    """
    is_finite = torch.cat([torch.isfinite(rows).all(dim=-1) for rows in embeddings.split(4096)])
    if not bool(is_finite.all()):
        rows = torch.nonzero(~is_finite).flatten()
        raise ValueError(
            f"{name}: {len(rows)} of {len(embeddings)} embeddings hold NaN or infinity, the first "
            f"in row {int(rows[0])}; the checkpoint has diverged or its input is damaged"
        )
