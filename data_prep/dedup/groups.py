"""Groups of similar samples, built from pairs, and the choice of the sample that each group keeps.

Similarity is chained: if a is similar to b, and b to c, all three form one group, even if a and c
are dissimilar. Thresholds should be strict enough for that.

Query samples (from which duplicates are dropped) come first, then evaluation samples (to
decontaminate against). A group with evaluation samples keeps only these. Any other group keeps the
sample with the lowest rank; ties are broken by order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Pairs of similar samples."""

    first: np.ndarray  # int64 [m]
    second: np.ndarray  # int64 [m]
    similarity: np.ndarray  # float32 [m]


@dataclass(frozen=True)
class GroupedSamples:
    """The samples that belong to groups, sorted by group; groups are ordered by first sample."""

    sample: np.ndarray  # int64 [n]
    group: np.ndarray  # int64 [n], from 0
    is_kept: np.ndarray  # bool [n]
    match: np.ndarray  # int64 [n]: similar sample that causes the drop; -1 if kept
    similarity: np.ndarray  # float32 [n]: similarity to the match; NaN if kept


def group_samples(pairs: Pairs, *, rank: np.ndarray, num_queries: int) -> GroupedSamples:
    """Joins pairs into groups and chooses the samples to keep.

    The match of a dropped sample is one of the samples that it forms a pair with. Evaluation
    samples take precedence, then the kept sample, then the most similar sample, and then the first.

    Args:
        pairs: in any order; repeated pairs have no effect.
        rank: float64 [samples]; a group keeps the sample with the lowest rank.
        num_queries: number of query samples; all samples after them are evaluation samples.
    """
    ends = np.concatenate([pairs.first, pairs.second])
    sample, index = np.unique(ends, return_inverse=True)
    first, second = index.reshape(2, -1)
    group = np.unique(first_connected(len(sample), first, second), return_inverse=True)[1]
    is_evaluation = sample >= num_queries
    is_kept = _kept(group, rank=rank[sample], is_evaluation=is_evaluation)
    match, similarity = _matches(
        np.concatenate([first, second]),
        np.concatenate([second, first]),
        np.tile(pairs.similarity, 2),
        is_kept=is_kept,
        is_evaluation=is_evaluation,
    )
    order = np.argsort(group, kind="stable")
    return GroupedSamples(
        sample=sample[order],
        group=group[order],
        is_kept=is_kept[order],
        match=np.where(is_kept, -1, sample[match])[order],
        similarity=np.where(is_kept, np.nan, similarity)[order],
    )


def first_connected(num: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Returns the smallest number in the connected component of every number, int64 [num].

    Args:
        num: numbers are 0 to num - 1.
        first: int64 [m], first number of each pair.
        second: int64 [m], second number of each pair.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not num:
        return np.zeros(0, dtype=np.int64)
    is_pair = np.ones(len(first), dtype=bool)
    graph = coo_array((is_pair, (first, second)), shape=(num, num))
    _, component = connected_components(graph, directed=False)
    return np.unique(component, return_index=True)[1][component]


def _kept(group: np.ndarray, *, rank: np.ndarray, is_evaluation: np.ndarray) -> np.ndarray:
    """Returns bool [n]: True for a group's evaluation samples, or else for its first by rank."""
    order = np.lexsort((np.arange(len(group)), rank, group))
    leads = np.ones(len(group), dtype=bool)
    leads[1:] = group[order][1:] != group[order][:-1]
    is_best = np.zeros(len(group), dtype=bool)
    is_best[order[leads]] = True
    has_evaluation = np.zeros(len(group), dtype=bool)
    has_evaluation[group[is_evaluation]] = True
    return np.where(has_evaluation[group], is_evaluation, is_best)


def _matches(
    sample: np.ndarray,
    other: np.ndarray,
    similarity: np.ndarray,
    *,
    is_kept: np.ndarray,
    is_evaluation: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the best partner of each sample, int64 [n], and the similarity to it."""
    order = np.lexsort((other, -similarity, ~is_kept[other], ~is_evaluation[other], sample))
    best = order[np.searchsorted(sample[order], np.arange(len(is_kept)))]
    return other[best], similarity[best]
