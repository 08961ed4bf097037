"""Where all right answers of a query stand in its ranking, and the figures that follow from it.

Answers with the same score are in no order: every figure is its mean over all orders of them. So a
model that gives every pair the same score scores what guessing scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from eval.metrics.ranking import QueryRanks


@dataclass(frozen=True)
class RightAnswers:
    """The levels of score at which a query has right answers, best first; arrays are int64 [L].

    `query` rises; every query has at least one level.
    """

    query: np.ndarray  # whose level it is
    num_above: np.ndarray  # answers that score higher, right and wrong ones
    num_right_above: np.ndarray  # right ones among them
    num_level: np.ndarray  # answers of this score
    num_right: np.ndarray  # right ones among them
    gallery_size: int

    @property
    def num_right_of_query(self) -> np.ndarray:
        """[Q] right answers of each query."""
        return self._sum_of_levels(self.num_right).astype(np.int64)

    def query_ranks(self) -> QueryRanks:
        """What stands above and level with each query's best right answer."""
        best = np.flatnonzero(self.num_right_above == 0)
        return QueryRanks(
            num_above=self.num_above[best],
            num_level=(self.num_level - self.num_right)[best],
            num_right_level=self.num_right[best],
            gallery_size=self.gallery_size,
        )

    def true_recall_at(self, k: int) -> np.ndarray:
        """Share of a query's right answers that are among the first k.

        Returns:
            [Q] float64.
        """
        among = np.clip(k - self.num_above, 0, self.num_level)
        found = self._sum_of_levels(self.num_right * among / self.num_level)
        return found / self.num_right_of_query

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
        alone = is_among * (self.num_right_above + 1) / (self.num_above + 1)
        total = self.num_right_of_query
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

        alone = (self.num_right_above == 0) / (self.num_above + 1)
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
            for bound in (self.num_above, self.num_above + self.num_level)
        )
        gained = self._sum_of_levels(self.num_right / self.num_level * (sums[last] - sums[first]))
        return gained / sums[np.minimum(self.num_right_of_query, len(sums) - 1)]

    def _sum_of_levels(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.query, weights=values)

    def _at_levels(
        self, value: Callable[[int, int, int, int], float], alone: np.ndarray
    ) -> np.ndarray:
        """[L] a value of (num_above, num_right_above, num_level, num_right), taken once for levels
        that are alike.

        Args:
            value: the function.
            alone: [L] its values at levels of one answer, which most are.
        """
        columns = (self.num_above, self.num_right_above, self.num_level, self.num_right)
        is_tied = self.num_level > 1
        if not is_tied.any():
            return alone
        rows = np.stack(columns, axis=1)[is_tied]
        distinct, which = np.unique(rows, axis=0, return_inverse=True)
        values = alone.astype(np.float64)
        values[is_tied] = np.array([value(*row) for row in distinct.tolist()])[which.reshape(-1)]
        return values


def right_answers(
    query: np.ndarray,
    score: np.ndarray,
    *,
    num_wrong_above: np.ndarray,
    num_wrong_level: np.ndarray,
    gallery_size: int,
) -> RightAnswers:
    """The levels of right pairs of queries and answers.

    Args:
        query: [P] integers from 0, each used.
        score: [P] of the pair.
        num_wrong_above: [P] wrong answers that score higher.
        num_wrong_level: [P] wrong answers that score the same.
        gallery_size: answers to choose from.
    """
    order = np.lexsort((-score, query))
    query, score = query[order], score[order]
    begins = np.flatnonzero(np.diff(query, prepend=-1) | (np.diff(score, prepend=np.nan) != 0))
    num_right = np.diff(begins, append=len(query))
    of_level = query[begins]
    # Right answers above: those of the query's earlier levels.
    num_right_above = begins - np.searchsorted(query, of_level)
    return RightAnswers(
        query=of_level,
        num_above=num_wrong_above[order][begins] + num_right_above,
        num_right_above=num_right_above,
        num_level=num_wrong_level[order][begins] + num_right,
        num_right=num_right,
        gallery_size=gallery_size,
    )


def answers_at_chance(num_right: np.ndarray, *, gallery_size: int) -> RightAnswers:
    """Those of a model that knows nothing: every answer is level with every other.

    Args:
        num_right: [Q] right answers of each query.
        gallery_size: answers to choose from.
    """
    num_right = np.asarray(num_right, dtype=np.int64)
    return RightAnswers(
        query=np.arange(len(num_right)),
        num_above=np.zeros_like(num_right),
        num_right_above=np.zeros_like(num_right),
        num_level=np.full_like(num_right, gallery_size),
        num_right=num_right,
        gallery_size=gallery_size,
    )
