"""Where all right answers of a query stand in its ranking, and the metrics that follow from it.

Answers with the same score are in no order: every metric is its mean over all orders of them. So a
model that gives every pair the same score scores what guessing scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.metrics.ranking import QueryRanks


@dataclass(frozen=True)
class RankedRelevance:
    """The levels of score at which a query has right answers, best first; arrays are int64 [L].

    `query` rises; every query has at least one level.
    """

    query: np.ndarray  # whose level it is
    num_above: np.ndarray  # answers that score higher, right and wrong ones
    num_relevant_above: np.ndarray  # right ones among them
    num_tied: np.ndarray  # answers of this score
    num_relevant: np.ndarray  # right ones among them
    gallery_size: int

    @property
    def num_relevant_of_query(self) -> np.ndarray:
        """[Q] right answers of each query."""
        return self._sum_of_levels(self.num_relevant).astype(np.int64)

    def query_ranks(self) -> QueryRanks:
        """What stands above and level with each query's best right answer."""
        best = np.flatnonzero(self.num_relevant_above == 0)
        return QueryRanks(
            num_above=self.num_above[best],
            num_tied=(self.num_tied - self.num_relevant)[best],
            num_tied_relevant=self.num_relevant[best],
            gallery_size=self.gallery_size,
        )

    def true_recall_at(self, k: int) -> np.ndarray:
        """Share of a query's right answers that are among the first k.

        Returns:
            [Q] float64.
        """
        among = np.clip(k - self.num_above, 0, self.num_tied)
        found = self._sum_of_levels(self.num_relevant * among / self.num_tied)
        return found / self.num_relevant_of_query

    def average_precision(self, k: int | None = None) -> np.ndarray:
        """Mean over a query's right answers of the precision at their ranks.

        With k it is trec_eval's and ranx's AP@k: right answers after the first k count nothing, and
        the sum is divided by k if there are more right answers than that. With ties it is the mean
        over all orders (McSherry and Najork 2008, "Computing information retrieval performance
        measures efficiently in the presence of tied scores", section 2.4).

        Returns:
            [Q] float64.
        """

        def of_level(above: int, right_above: int, level: int, right: int) -> float:
            places = np.arange(1, level + 1)
            places = places[above + places <= (k or self.gallery_size)]
            earlier = (places - 1) * (right - 1) / max(1, level - 1)
            return float((right / level * (right_above + 1 + earlier) / (above + places)).sum())

        is_among = self.num_above < (k or self.gallery_size)
        alone = is_among * (self.num_relevant_above + 1) / (self.num_above + 1)
        total = self.num_relevant_of_query
        return self._sum_of_levels(self._at_levels(of_level, alone)) / np.minimum(total, k or total)

    def reciprocal_rank(self) -> np.ndarray:
        """One over the rank of the first right answer.

        Returns:
            [Q] float64.
        """

        def of_level(above: int, right_above: int, level: int, right: int) -> float:
            if right_above:
                return 0.0
            places = np.arange(1, level - right + 2)
            # The first right answer is not at an earlier place of the level, then it is at this.
            left = level - places[:-1] + 1
            is_later = np.cumprod(np.concatenate([[1.0], (left - right) / left]))
            shares = is_later * right / (level - places + 1)
            return float((shares / (above + places)).sum())

        alone = (self.num_relevant_above == 0) / (self.num_above + 1)
        return self._sum_of_levels(self._at_levels(of_level, alone))

    def ndcg_at(self, k: int) -> np.ndarray:
        """Discounted gain of the right answers among the first k, over the largest that there is
        (Jarvelin and Kekalainen 2002, with a gain of 1 and log2(1 + rank)).

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
        """Returns [L] values of (num_above, num_relevant_above, num_tied, num_relevant), computed
        once for all equal levels.

        Args:
            value: the function.
            alone: [L] its values at levels of one answer, which most are.
        """
        columns = (self.num_above, self.num_relevant_above, self.num_tied, self.num_relevant)
        is_tied = self.num_tied > 1
        if not is_tied.any():
            return alone
        rows = np.stack(columns, axis=1)[is_tied]
        distinct, which = np.unique(rows, axis=0, return_inverse=True)
        values = alone.astype(np.float64)
        values[is_tied] = np.array([value(*row) for row in distinct.tolist()])[which.reshape(-1)]
        return values


def ranked_relevance(
    query: np.ndarray,
    score: np.ndarray,
    *,
    num_irrelevant_above: np.ndarray,
    num_irrelevant_tied: np.ndarray,
    gallery_size: int,
) -> RankedRelevance:
    """The levels of right pairs of queries and answers.

    Args:
        query: [P] integers from 0, each used.
        score: [P] of the pair.
        num_irrelevant_above: [P] wrong answers that score higher.
        num_irrelevant_tied: [P] wrong answers that score the same.
        gallery_size: answers to choose from.
    """
    order = np.lexsort((-score, query))
    query, score = query[order], score[order]
    begins = np.flatnonzero(np.diff(query, prepend=-1) | (np.diff(score, prepend=np.nan) != 0))
    num_relevant = np.diff(begins, append=len(query))
    of_level = query[begins]
    # Right answers above: those of the query's earlier levels.
    num_relevant_above = begins - np.searchsorted(query, of_level)
    return RankedRelevance(
        query=of_level,
        num_above=num_irrelevant_above[order][begins] + num_relevant_above,
        num_relevant_above=num_relevant_above,
        num_tied=num_irrelevant_tied[order][begins] + num_relevant,
        num_relevant=num_relevant,
        gallery_size=gallery_size,
    )


def relevance_at_chance(num_relevant: np.ndarray, *, gallery_size: int) -> RankedRelevance:
    """Those of a model that knows nothing: every answer is level with every other.

    Args:
        num_relevant: [Q] right answers of each query.
        gallery_size: answers to choose from.
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
