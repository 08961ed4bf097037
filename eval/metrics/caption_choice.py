"""Choice of the correct caption or media item among a few nearly identical ones.

These benchmarks test compositional understanding: word order, and which attribute belongs to which
object. Ties are averaged over random orders.

1. SugarCrepe (Hsieh et al. 2023): an item must be nearer to its own caption than to all wrong ones.
2. Winoground (Thrush et al. 2022, section 3): the captions of a group of items share their words.
   The text score is 1 if every item is nearest to its own caption. The image score is 1 if every
   caption is nearest to its own item. The group score is 1 if both are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import factorial

import numpy as np
from torch import Tensor

from eval.metrics.intervals import Score, mean_score
from eval.metrics.ranking import QueryRanks, check_finite, cosine_scores

NUM_ORDERS = 1000  # random orders over which the ties of a group are averaged
GROUP_METRICS = ("text_score", "image_score", "group_score")


@dataclass(frozen=True)
class CaptionChoiceResult:
    """Metrics of one caption choice task."""

    scores: dict[str, Score]
    # Metric -> [Q] hit of each item, or [groups] hit of each group
    hits: dict[str, np.ndarray]


def choose_captions(
    media_embeddings: Tensor,
    caption_embeddings: Tensor,
    *,
    num_captions: Sequence[int],
) -> CaptionChoiceResult:
    """Computes the fraction of items nearer to their own caption than to every wrong one.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        caption_embeddings: [M, D], L2-normalised, item by item; each item's own caption is first.
        num_captions: [Q] number of captions of each item; they sum to M.

    Raises:
        ValueError: if an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(caption_embeddings, name="caption_embeddings")
    of_items = caption_embeddings.split(list(num_captions))
    counts = []
    for media, captions in zip(media_embeddings.split(1), of_items, strict=True):
        own, *wrong = cosine_scores(media, captions)[0].tolist()
        counts.append((sum(w > own for w in wrong), sum(w == own for w in wrong)))
    above, tied = np.array(counts, dtype=np.int64).T
    ranks = QueryRanks(above, tied, np.ones_like(above), gallery_size=max(num_captions))
    hits = ranks.hits_at(1)
    chance = float(np.mean(1 / np.asarray(num_captions)))
    score = mean_score(hits, chance=chance)
    return CaptionChoiceResult({"caption_accuracy": score}, {"caption_accuracy": hits})


def choose_in_groups(
    media_embeddings: Tensor,
    caption_embeddings: Tensor,
    *,
    groups: Sequence[Sequence[int]],
    seed: int = 0,
) -> CaptionChoiceResult:
    """Computes Winoground's text, image and group scores.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        caption_embeddings: [Q, D], L2-normalised; one caption per item.
        groups: indices of the items of each group.
        seed: seed of the random orders of ties.

    Raises:
        ValueError: if an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(caption_embeddings, name="caption_embeddings")
    hits = np.array(
        [
            _group_hits(
                cosine_scores(media_embeddings[indices], caption_embeddings[indices]).cpu().numpy(),
                seed=seed,
            )
            for indices in map(list, groups)
        ]
    )  # [groups, 3]
    chances = np.mean([_chances(len(indices)) for indices in groups], axis=0)
    scores = {
        metric: mean_score(hits[:, column], chance=float(chances[column]))
        for column, metric in enumerate(GROUP_METRICS)
    }
    return CaptionChoiceResult(
        scores, {metric: hits[:, column] for column, metric in enumerate(GROUP_METRICS)}
    )


def _chances(size: int) -> tuple[float, float, float]:
    """Computes the expected (text, image, group) scores of a group with random similarities.

    For the group score, each own pair must exceed all other pairs of its item and of its caption.
    The k-th lowest own pair limits 2 (size - k) other pairs. The probability is thus the mean of
    the product of U_k^(2 (size - k)) over ordered uniforms U_k: (size - 1)! / (2 size - 1)!.
    """
    one_side = 1 / size**size
    return one_side, one_side, factorial(size - 1) / factorial(2 * size - 1)


def _group_hits(
    scores: np.ndarray, *, seed: int, num_orders: int = NUM_ORDERS
) -> tuple[float, float, float]:
    """Computes (text, image, group) scores of a group from its similarities [items, captions].

    They are 0 or 1, or a fraction of the random orders if similarities tie.
    """
    levels = np.unique(scores, return_inverse=True)[1].reshape(1, *scores.shape).astype(float)
    if len(np.unique(scores)) < scores.size:
        noise = np.random.default_rng(seed).random((num_orders, *scores.shape))
        levels = levels + noise  # below 1, so that it reorders only equal scores
    own = np.diagonal(levels, axis1=1, axis2=2)  # [orders, items]
    is_text_right = (own == levels.max(axis=2)).all(axis=1)
    is_image_right = (own == levels.max(axis=1)).all(axis=1)
    is_both = is_text_right & is_image_right
    return is_text_right.mean(), is_image_right.mean(), is_both.mean()
