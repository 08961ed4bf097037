"""Association of pictures with a word (WinoGAViL, Bitton et al. 2022): of a few media items, those
that are nearest to a cue are chosen, as many as are right, and compared by Jaccard's index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from torch import Tensor

from eval.metrics.intervals import Bootstrap, Score, mean_score
from eval.metrics.ranking import check_finite, cosine_scores


@dataclass(frozen=True)
class AssociationResult:
    """The metrics of one task."""

    scores: dict[str, Score]
    jaccard: np.ndarray  # [cues]


def associate(
    media_embeddings: Tensor,
    cue_embeddings: Tensor,
    *,
    groups: Sequence[Sequence[int]],
    is_right: np.ndarray,
    bootstrap: Bootstrap,
) -> AssociationResult:
    """The mean Jaccard index of what is chosen and what is right; ties are broken at chance.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        cue_embeddings: [cues, D], L2-normalised.
        groups: [cues] places of the items to choose from.
        is_right: bool [Q]; of each group at least one.
        bootstrap: over cues.

    Raises:
        ValueError: an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(cue_embeddings, name="cue_embeddings")
    found, at_chance = [], []
    for places, cue in zip(groups, cue_embeddings.split(1), strict=True):
        right = is_right[list(places)]
        scores = cosine_scores(cue, media_embeddings[list(places)])[0].cpu().numpy()
        found.append(expected_jaccard(scores, right))
        at_chance.append(expected_jaccard(np.zeros(len(right)), right))
    jaccard = np.array(found)
    score = mean_score(jaccard, chance=float(np.mean(at_chance)), bootstrap=bootstrap)
    return AssociationResult({"jaccard": score}, jaccard)


def expected_jaccard(scores: np.ndarray, is_right: np.ndarray) -> float:
    """Of the k best scores and the k right ones: the mean over all orders of equal scores.

    Args:
        scores: [n]
        is_right: bool [n], k of them true.
    """
    k = int(is_right.sum())
    last = np.sort(scores)[-k]
    is_above, is_level = scores > last, scores == last
    num_hits = int((is_above & is_right).sum())
    num_drawn, num_tied = k - int(is_above.sum()), int(is_level.sum())
    num_tied_relevant = int((is_level & is_right).sum())
    total = 0.0
    for drawn_right in range(min(num_drawn, num_tied_relevant) + 1):
        ways = comb(num_tied_relevant, drawn_right)
        ways *= comb(num_tied - num_tied_relevant, num_drawn - drawn_right)
        hits = num_hits + drawn_right
        total += ways * hits / (2 * k - hits)
    return total / comb(num_tied, num_drawn)
