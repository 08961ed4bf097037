"""Choice among a few captions, or media items, that are nearly alike: does a model read the order
of words, and what belongs to what?

SugarCrepe (Hsieh et al. 2023): an item, its caption, and wrong ones. Winoground (Thrush et al.
2022, section 3): a group of items whose captions share their words; its text score counts if every
item is nearest to its own caption, its image score if every caption is nearest to its own item, its
group score if both hold. Ties are broken at chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eval.metrics.intervals import Bootstrap, Score, mean_score
from eval.metrics.ranking import QueryRanks, check_finite, cosine_scores

NUM_ORDERS = 1000  # of ties in a group, drawn
GROUP_METRICS = ("text_score", "image_score", "group_score")


@dataclass(frozen=True)
class CaptionChoiceResult:
    """The metrics of one choice."""

    scores: dict[str, Score]
    # Metric -> [Q] of each item, or [groups] of each group
    hits: dict[str, np.ndarray]


def choose_captions(
    media_embeddings: Tensor,
    caption_embeddings: Tensor,
    *,
    num_captions: Sequence[int],
    bootstrap: Bootstrap,
) -> CaptionChoiceResult:
    """Share of items nearer to their own caption than to every wrong one.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        caption_embeddings: [M, D], L2-normalised; those of the first item, its own first, then
            those of the second, and so on.
        num_captions: [Q] of each item; M together.
        bootstrap: over items.

    Raises:
        ValueError: an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(caption_embeddings, name="caption_embeddings")
    of_items = caption_embeddings.split(list(num_captions))
    counts = []
    for media, captions in zip(media_embeddings.split(1), of_items, strict=True):
        own, *wrong = cosine_scores(media, captions)[0].tolist()
        counts.append((sum(w > own for w in wrong), sum(w == own for w in wrong)))
    above, level = np.array(counts, dtype=np.int64).T
    ranks = QueryRanks(above, level, np.ones_like(above), gallery_size=max(num_captions))
    hits = ranks.hits_at(1)
    chance = float(np.mean(1 / np.asarray(num_captions)))
    score = mean_score(hits, chance=chance, bootstrap=bootstrap)
    return CaptionChoiceResult({"caption_accuracy": score}, {"caption_accuracy": hits})


def choose_in_groups(
    media_embeddings: Tensor,
    caption_embeddings: Tensor,
    *,
    groups: Sequence[Sequence[int]],
    bootstrap: Bootstrap,
) -> CaptionChoiceResult:
    """Text, image and group score.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        caption_embeddings: [Q, D], L2-normalised; of each item its own.
        groups: places of the items of each group.
        bootstrap: over groups.

    Raises:
        ValueError: an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(caption_embeddings, name="caption_embeddings")
    hits = np.array(
        [
            _group_hits(
                cosine_scores(media_embeddings[indices], caption_embeddings[indices]).cpu().numpy(),
                seed=bootstrap.seed,
            )
            for indices in map(list, groups)
        ]
    )  # [groups, 3]
    at_chance = {
        size: _group_hits(np.zeros((size, size)), seed=0, num_orders=100_000)
        for size in {len(g) for g in groups}
    }
    chances = np.mean([at_chance[len(indices)] for indices in groups], axis=0)
    scores = {
        metric: mean_score(hits[:, place], chance=float(chances[place]), bootstrap=bootstrap)
        for place, metric in enumerate(GROUP_METRICS)
    }
    return CaptionChoiceResult(
        scores, {metric: hits[:, place] for place, metric in enumerate(GROUP_METRICS)}
    )


def _group_hits(
    scores: np.ndarray, *, seed: int, num_orders: int = NUM_ORDERS
) -> tuple[float, float, float]:
    """(text, image, group score) of one group, [items, captions]; shares where ties are broken."""
    levels = np.unique(scores, return_inverse=True)[1].reshape(1, *scores.shape).astype(float)
    if len(np.unique(scores)) < scores.size:
        noise = np.random.default_rng(seed).random((num_orders, *scores.shape))
        levels = levels + noise  # below 1: reorders equal scores alone
    own = np.diagonal(levels, axis1=1, axis2=2)  # [orders, items]
    is_text_right = (own == levels.max(axis=2)).all(axis=1)
    is_image_right = (own == levels.max(axis=1)).all(axis=1)
    is_both = is_text_right & is_image_right
    return is_text_right.mean(), is_image_right.mean(), is_both.mean()
