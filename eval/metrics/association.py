"""Association of media items with a cue word (WinoGAViL, Bitton et al. 2022).

From a few candidate items, the k nearest to the cue are chosen, where k is the number of correct
items. The Jaccard index compares the chosen items with the correct ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from torch import Tensor

from eval.metrics.intervals import Score, mean_score
from eval.metrics.ranking import check_finite, cosine_scores


@dataclass(frozen=True)
class AssociationResult:
    """Metrics of one association task."""

    scores: dict[str, Score]
    jaccard: np.ndarray  # [cues] Jaccard index of each cue


def associate(
    media_embeddings: Tensor,
    cue_embeddings: Tensor,
    *,
    groups: Sequence[Sequence[int]],
    is_correct: np.ndarray,
) -> AssociationResult:
    """Computes the mean Jaccard index of chosen and correct items; ties are averaged.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        cue_embeddings: [cues, D], L2-normalised.
        groups: [cues] indices of each cue's candidate items.
        is_correct: bool [Q]; at least one item of each group is correct.

    Raises:
        ValueError: if an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(cue_embeddings, name="cue_embeddings")
    found, at_chance = [], []
    for indices, cue in zip(groups, cue_embeddings.split(1), strict=True):
        right = is_correct[list(indices)]
        scores = cosine_scores(cue, media_embeddings[list(indices)])[0].cpu().numpy()
        found.append(expected_jaccard(scores, right))
        at_chance.append(expected_jaccard(np.zeros(len(right)), right))
    jaccard = np.array(found)
    score = mean_score(jaccard, chance=float(np.mean(at_chance)))
    return AssociationResult({"jaccard": score}, jaccard)


def expected_jaccard(scores: np.ndarray, is_correct: np.ndarray) -> float:
    """Computes the Jaccard index of the k best-scored items and the k correct ones.

    Ties are averaged over all orders of equal scores.

    Args:
        scores: [n]
        is_correct: bool [n]; k of them are true.
    """
    k = int(is_correct.sum())
    last = np.sort(scores)[-k]
    is_above, is_tied = scores > last, scores == last
    num_hits = int((is_above & is_correct).sum())
    num_drawn, num_tied = k - int(is_above.sum()), int(is_tied.sum())
    num_tied_right = int((is_tied & is_correct).sum())
    total = 0.0
    for drawn_right in range(min(num_drawn, num_tied_right) + 1):
        ways = comb(num_tied_right, drawn_right)
        ways *= comb(num_tied - num_tied_right, num_drawn - drawn_right)
        hits = num_hits + drawn_right
        total += ways * hits / (2 * k - hits)
    return total / comb(num_tied, num_drawn)
