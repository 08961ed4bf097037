"""Ranks of all relevant candidates of each query, and the metrics computed from them.

Every metric is averaged over all orders of tied candidates. A model that gives every pair the same
score is therefore measured at exactly chance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.metrics.ranking import QueryRanks


@dataclass(frozen=True)
class RankedRelevance:
    """Distinct scores ("levels") of the relevant candidates, best first within each query.

    Arrays are int64 [L], one entry per level. `query` never decreases; every query has at least one
    level.
    """

    query: np.ndarray  # query that the level belongs to
    num_above: np.ndarray  # candidates that score higher, relevant or not
    num_relevant_above: np.ndarray  # relevant ones among num_above
    num_tied: np.ndarray  # candidates with this score, relevant or not
    num_relevant: np.ndarray  # relevant ones among num_tied
    gallery_size: int

    @property
    def num_relevant_of_query(self) -> np.ndarray:
        """Number of relevant candidates of each query, [Q]."""
        return self._sum_of_levels(self.num_relevant).astype(np.int64)

    def query_ranks(self) -> QueryRanks:
        """Returns the number of competitors of each query's best relevant candidate."""
        best = np.flatnonzero(self.num_relevant_above == 0)
        return QueryRanks(
            num_above=self.num_above[best],
            num_tied=(self.num_tied - self.num_relevant)[best],
            num_tied_relevant=self.num_relevant[best],
            gallery_size=self.gallery_size,
        )

    def true_recall_at(self, k: int) -> np.ndarray:
        """Computes the fraction of each query's relevant candidates that rank among the first k.

        Returns:
            [Q] float64.
        """
        among = np.clip(k - self.num_above, 0, self.num_tied)
        found = self._sum_of_levels(self.num_relevant * among / self.num_tied)
        return found / self.num_relevant_of_query

    def average_precision(self, k: int | None = None) -> np.ndarray:
        """Computes the mean, over a query's relevant candidates, of the precision at their ranks.

        With k it is AP@k as in trec_eval (map_cut) and ranx. Relevant candidates beyond rank k
        count as 0, and the sum is divided by the number of all relevant candidates. With more than
        k of them, even a perfect ranking scores below 1.
        Ties are averaged over all orders: McSherry and Najork 2008, "Computing information
        retrieval performance measures efficiently in the presence of tied scores", section 2.4.

        Returns:
            [Q] float64.
        """

        def at_level(above: int, relevant_above: int, tied: int, relevant: int) -> float:
            offsets = np.arange(1, tied + 1)
            offsets = offsets[above + offsets <= (k or self.gallery_size)]
            earlier = (offsets - 1) * (relevant - 1) / max(1, tied - 1)
            found = relevant_above + 1 + earlier
            return float((relevant / tied * found / (above + offsets)).sum())

        is_among = self.num_above < (k or self.gallery_size)
        alone = is_among * (self.num_relevant_above + 1) / (self.num_above + 1)
        total = self.num_relevant_of_query
        return self._sum_of_levels(self._at_levels(at_level, alone)) / total

    def reciprocal_rank(self) -> np.ndarray:
        """Computes the reciprocal rank of each query's first relevant candidate.

        Returns:
            [Q] float64.
        """

        def at_level(above: int, relevant_above: int, tied: int, relevant: int) -> float:
            if relevant_above:
                return 0.0
            offsets = np.arange(1, tied - relevant + 2)
            # Probability that the first relevant candidate has a given offset within the tie.
            left = tied - offsets[:-1] + 1
            is_later = np.cumprod(np.concatenate([[1.0], (left - relevant) / left]))
            probabilities = is_later * relevant / (tied - offsets + 1)
            return float((probabilities / (above + offsets)).sum())

        alone = (self.num_relevant_above == 0) / (self.num_above + 1)
        return self._sum_of_levels(self._at_levels(at_level, alone))

    def ndcg_at(self, k: int) -> np.ndarray:
        """Computes the normalised discounted cumulative gain of the first k candidates.

        Gains are binary and discounted by log2(1 + rank) (Jarvelin and Kekalainen 2002).

        Returns:
            [Q] float64.
        """
        gains = 1 / np.log2(np.arange(2, self.gallery_size + 2))
        sums = np.concatenate([[0.0], np.cumsum(gains[: min(k, self.gallery_size)])])
        first, last = (
            np.minimum(bound, len(sums) - 1)
            for bound in (self.num_above, self.num_above + self.num_tied)
        )
        gained = self._sum_of_levels(self.num_relevant / self.num_tied * (sums[last] - sums[first]))
        return gained / sums[np.minimum(self.num_relevant_of_query, len(sums) - 1)]

    def _sum_of_levels(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.query, weights=values)

    def _at_levels(
        self, value: Callable[[int, int, int, int], float], alone: np.ndarray
    ) -> np.ndarray:
        """Evaluates a function once for each distinct level.

        Args:
            value: function of (num_above, num_relevant_above, num_tied, num_relevant).
            alone: [L] values for levels that consist of a single candidate, the usual case.
        """
        columns = (self.num_above, self.num_relevant_above, self.num_tied, self.num_relevant)
        is_tied = self.num_tied > 1
        if not is_tied.any():
            return alone
        rows = np.stack(columns, axis=1)[is_tied]
        distinct, inverse = np.unique(rows, axis=0, return_inverse=True)
        values = alone.astype(np.float64)
        values[is_tied] = np.array([value(*row) for row in distinct.tolist()])[inverse.reshape(-1)]
        return values


def ranked_relevance(
    query: np.ndarray,
    score: np.ndarray,
    *,
    num_irrelevant_above: np.ndarray,
    num_irrelevant_tied: np.ndarray,
    gallery_size: int,
) -> RankedRelevance:
    """Groups relevant pairs of query and candidate into levels of equal score.

    Args:
        query: [P] query of each pair, integers from 0 without gaps.
        score: [P] score of each pair.
        num_irrelevant_above: [P] irrelevant candidates that score higher.
        num_irrelevant_tied: [P] irrelevant candidates that score the same.
        gallery_size: number of candidates.
    """
    order = np.lexsort((-score, query))
    query, score = query[order], score[order]
    starts = np.flatnonzero(np.diff(query, prepend=-1) | (np.diff(score, prepend=np.nan) != 0))
    num_relevant = np.diff(starts, append=len(query))
    level_query = query[starts]
    # Relevant candidates above a level are those of the query's earlier levels.
    num_relevant_above = starts - np.searchsorted(query, level_query)
    return RankedRelevance(
        query=level_query,
        num_above=num_irrelevant_above[order][starts] + num_relevant_above,
        num_relevant_above=num_relevant_above,
        num_tied=num_irrelevant_tied[order][starts] + num_relevant,
        num_relevant=num_relevant,
        gallery_size=gallery_size,
    )


def relevance_at_chance(num_relevant: np.ndarray, *, gallery_size: int) -> RankedRelevance:
    """Returns the ranked relevance of a chance-level model, which scores all candidates equally.

    Args:
        num_relevant: [Q] relevant candidates of each query.
        gallery_size: number of candidates.
    """
    num_relevant = np.asarray(num_relevant, dtype=np.int64)
    return RankedRelevance(
        query=np.arange(len(num_relevant)),
        num_above=np.zeros_like(num_relevant),
        num_relevant_above=np.zeros_like(num_relevant),
        num_tied=np.full_like(num_relevant, gallery_size),
        num_relevant=num_relevant,
        gallery_size=gallery_size,
    )
