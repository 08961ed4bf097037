"""From pairs that match to groups, and to the one sample of each that is kept.

Samples are numbered in the order in which they are to be kept: 0 is the most wanted. A sample is
kept unless it matches one that is kept already. So every sample that is dropped is like one that
stays; and of a chain in which only neighbours are alike (frames of a film) not all but one are
lost, as they would be if groups were simply the parts that hang together. A group is what hangs
together all the same, and may so keep several samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Matches:
    """Pairs of samples that match; and members of classes, which go the way of their first."""

    left: np.ndarray  # int64 [pairs]
    right: np.ndarray  # int64 [pairs]
    similarity: np.ndarray  # float [pairs]
    members: np.ndarray  # int64 [members], none of which is in a pair
    member_firsts: np.ndarray  # int64 [members], none of which is a member
    member_similarity: np.ndarray  # float [members]


@dataclass(frozen=True)
class Choice:
    """What becomes of every sample that matches another."""

    samples: np.ndarray  # int64 [found], rising
    groups: np.ndarray  # int64 [found]: the first sample of the group
    is_kept: np.ndarray  # bool [found]
    matches: np.ndarray  # int64 [found]: the kept sample that it is like; of a kept one, itself
    similarity: np.ndarray  # float64 [found]: to that one; 1 for kept ones


def first_of_equals(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: the first place at which each of [n] keys stands."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    firsts = np.empty(len(keys), np.int64)
    firsts[order] = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    return firsts


def class_matches(firsts: np.ndarray) -> Matches:
    """Matches of similarity 1: every sample with the first of its class; of int64 [n]."""
    members = np.flatnonzero(firsts != np.arange(len(firsts)))
    none = np.empty(0, np.int64)
    ones = np.ones(len(members))
    return Matches(none, none, np.empty(0), members, firsts[members], ones)


def choose_kept(matches: Matches, *, num_samples: int, is_reference: np.ndarray) -> Choice:
    """Which samples are kept, and what the others are like.

    Args:
        matches: of samples numbered from the most wanted on.
        num_samples: in all.
        is_reference: bool [num_samples]: always kept, also if it matches another.

    Returns:
        The samples in groups that hold one that is no reference; references only if matched.
    """
    keeper, similarity = _stars(matches, num_samples, is_reference)
    # A member is as like the keeper as the least like of the two steps on the way there.
    first_similarity = similarity[matches.member_firsts]
    keeper[matches.members] = keeper[matches.member_firsts]
    similarity[matches.members] = np.minimum(matches.member_similarity, first_similarity)
    stay = matches.members[is_reference[matches.members]]
    keeper[stay], similarity[stay] = stay, 1.0
    groups = connected_parts(
        np.concatenate([matches.left, matches.members]),
        np.concatenate([matches.right, matches.member_firsts]),
        num_samples=num_samples,
    )
    dropped = np.flatnonzero(keeper != np.arange(num_samples))
    has_dropped = np.zeros(num_samples, bool)
    has_dropped[groups[dropped]] = True
    samples = np.flatnonzero(has_dropped[groups])
    return Choice(
        samples=samples,
        groups=groups[samples],
        is_kept=keeper[samples] == samples,
        matches=keeper[samples],
        similarity=similarity[samples],
    )


def _stars(
    matches: Matches, num_samples: int, is_reference: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(keeper int64 [num_samples], similarity to it float64 [num_samples]), of pairs alone.

    Of several kept ones that a sample matches, the first is its keeper.
    """
    low, high = np.minimum(matches.left, matches.right), np.maximum(matches.left, matches.right)
    order = np.lexsort((high, low))
    low, high, pair_similarity = low[order], high[order], matches.similarity[order]
    keeper = np.arange(num_samples)
    similarity = np.ones(num_samples)
    is_kept = np.ones(num_samples, bool)
    edges = np.flatnonzero(np.diff(low, prepend=-1, append=num_samples))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        if not is_kept[low[begin]]:
            continue
        others, alike = high[begin:end], pair_similarity[begin:end]
        is_new = is_kept[others] & ~is_reference[others]
        is_kept[others[is_new]] = False
        keeper[others[is_new]] = low[begin]
        similarity[others[is_new]] = alike[is_new]
    return keeper, similarity


def connected_parts(left: np.ndarray, right: np.ndarray, *, num_samples: int) -> np.ndarray:
    """int64 [num_samples]: the first sample of the part that hangs together with each.

    Args:
        left, right: int64 [pairs]: the samples of each pair.
        num_samples: in all.
    """
    first = np.arange(num_samples)
    while True:
        low = np.minimum(first[left], first[right])
        lower = first.copy()
        np.minimum.at(lower, first[left], low)
        np.minimum.at(lower, first[right], low)
        lower = lower[lower]
        if np.array_equal(lower, first):
            return first
        first = lower
