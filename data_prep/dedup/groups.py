"""From pairs of samples that are alike to groups, of which one sample is kept.

Likeness is chained: where a is like b, and b like c, all three are one group, however little a and
c are alike. Thresholds should be strict enough for that.

Samples to choose from come first, samples to decontaminate against (evaluation samples) after them.
A group that holds an evaluation sample keeps nothing else; the evaluation sample itself is never
dropped. In other groups the sample of the least rank is kept; of equal ranks, the first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pairs:
    """Pairs of samples that are alike."""

    first: np.ndarray  # int64 [m]
    second: np.ndarray  # int64 [m]
    similarity: np.ndarray  # float32 [m]


@dataclass(frozen=True)
class GroupedSamples:
    """The samples that are in groups; sorted by group, which is in the order of first samples."""

    sample: np.ndarray  # int64 [n]
    group: np.ndarray  # int64 [n], from 0
    is_kept: np.ndarray  # bool [n]
    match: np.ndarray  # int64 [n]: the sample it is like; -1 where it is kept
    similarity: np.ndarray  # float32 [n]: to that one; NaN where it is kept


def connected_components(num: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The least number that each of `num` numbers is connected with, over any number of pairs.

    Args:
        num: of the numbers from 0 on.
        first: int64 [m], of each pair.
        second: int64 [m].

    Returns:
        int64 [num]
    """
    label = np.arange(num)
    while len(first):
        low = np.minimum(label[first], label[second])
        np.minimum.at(label, label[first], low)  # roots hook onto lower roots
        np.minimum.at(label, label[second], low)
        label = _roots(label)
        is_apart = label[first] != label[second]
        first, second = first[is_apart], second[is_apart]
    return label


def _roots(label: np.ndarray) -> np.ndarray:
    while True:
        higher = label[label]
        if np.array_equal(higher, label):
            return label
        label = higher


def group_samples(pairs: Pairs, *, rank: np.ndarray, num_queries: int) -> GroupedSamples:
    """The groups that pairs make, and what is kept of each.

    A dropped sample's match is one that a pair connects it with: an evaluation sample before the
    kept one, and that before others; then the most similar one, and then the first.

    Args:
        pairs: in any order; repeated ones do not matter.
        rank: float64 [samples], which to keep: the least.
        num_queries: samples from this one on are evaluation samples.
    """
    ends = np.concatenate([pairs.first, pairs.second])
    sample, place = np.unique(ends, return_inverse=True)
    first, second = place.reshape(2, -1)
    label = connected_components(len(sample), first, second)
    is_evaluation = sample >= num_queries
    is_kept = _kept(label, rank=rank[sample], is_evaluation=is_evaluation)
    match, similarity = _matches(
        np.concatenate([first, second]),
        np.concatenate([second, first]),
        np.tile(pairs.similarity, 2),
        is_kept=is_kept,
        is_evaluation=is_evaluation,
    )
    group = np.unique(label, return_inverse=True)[1]
    order = np.argsort(group, kind="stable")
    return GroupedSamples(
        sample=sample[order],
        group=group[order],
        is_kept=is_kept[order],
        match=np.where(is_kept, -1, sample[match])[order],
        similarity=np.where(is_kept, np.nan, similarity)[order],
    )


def _kept(label: np.ndarray, *, rank: np.ndarray, is_evaluation: np.ndarray) -> np.ndarray:
    """Bool [n]: the first of each group by rank and place, or the evaluation samples in it."""
    order = np.lexsort((np.arange(len(label)), rank, label))
    leads = np.ones(len(label), dtype=bool)
    leads[1:] = label[order][1:] != label[order][:-1]
    is_best = np.zeros(len(label), dtype=bool)
    is_best[order[leads]] = True
    has_evaluation = np.zeros(len(label), dtype=bool)
    has_evaluation[label[is_evaluation]] = True
    return np.where(has_evaluation[label], is_evaluation, is_best)


def _matches(
    sample: np.ndarray,
    other: np.ndarray,
    similarity: np.ndarray,
    *,
    is_kept: np.ndarray,
    is_evaluation: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The best of the others of each sample, int64 [n], and its similarity."""
    order = np.lexsort((other, -similarity, ~is_kept[other], ~is_evaluation[other], sample))
    best = order[np.searchsorted(sample[order], np.arange(len(is_kept)))]
    return other[best], similarity[best]
