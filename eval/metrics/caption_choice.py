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

MAX_EXACT = 10  # largest number of mutually tied pairs of a group whose orders are all counted
NUM_ORDERS = 1000  # random orders over which more mutually tied pairs are averaged
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
    score = mean_score(hits, chance=chance, are_hits=True)
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
        seed: seed of the random orders of more than MAX_EXACT mutually tied pairs.

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
        metric: mean_score(hits[:, column], chance=float(chances[column]), are_hits=True)
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


def _group_hits(scores: np.ndarray, *, seed: int) -> tuple[float, float, float]:
    """Computes (text, image, group) scores of a group from its similarities [items, captions].

    They are 0 or 1 without ties, and otherwise the fraction of all orders of equal similarities.
    """
    own = np.diagonal(scores)
    is_other = ~np.eye(len(scores), dtype=bool)
    sides = []
    for each in (scores, scores.T):
        num_tied = ((each == own[:, None]) & is_other).sum(axis=1)
        is_beaten = (each > own[:, None]).any()
        sides.append(0.0 if is_beaten else float(np.prod(1 / (1 + num_tied))))
    text, image = sides
    if not text or not image or text == image == 1:
        return text, image, text * image
    return text, image, _both_sides(scores, own, is_other, seed=seed)


def _both_sides(scores: np.ndarray, own: np.ndarray, is_other: np.ndarray, *, seed: int) -> float:
    """Computes the fraction of orders of ties in which every own pair is first on both sides.

    Ties are broken by uniform noise, U_i for own pair i. U_i must exceed the noise of each other
    pair that ties with i alone. min(U_i, U_j) must exceed that of each pair that ties with both.
    """
    of_item = (scores == own[:, None]) & is_other
    of_caption = (scores == own[None, :]) & is_other
    is_shared = of_item & of_caption
    alone = (of_item & ~is_shared).sum(axis=1) + (of_caption & ~is_shared).sum(axis=0)
    shared = is_shared.astype(np.int64) + is_shared.T
    members = np.flatnonzero(shared.any(axis=1))
    others = np.setdiff1d(np.arange(len(own)), members)
    chance = float(np.prod(1 / (1 + alone[others])))
    if len(members) <= MAX_EXACT:
        return chance * _mean_of_minima(alone[members], shared[np.ix_(members, members)])
    if len(members) == len(own) and is_shared.sum() == is_other.sum():
        return _chances(len(own))[2]
    noise = np.random.default_rng(seed).random((NUM_ORDERS, len(own)))
    pairs = np.argwhere(np.triu(shared))
    minima = noise[:, pairs].min(axis=2) ** shared[tuple(pairs.T)]
    products = minima.prod(axis=1) * (noise[:, members] ** alone[members]).prod(axis=1)
    return chance * float(products.mean())


def _mean_of_minima(alone: np.ndarray, shared: np.ndarray) -> float:
    """Computes the mean of prod_i U_i^alone[i] prod_{i<j} min(U_i, U_j)^shared[i, j], U uniform.

    Integrates over all orders of U, from the lowest on. An integral over the lowest members depends
    on which they are, and not on their order.

    Args:
        alone: int64 [n]
        shared: int64 [n, n], symmetric.
    """
    num_members, means = len(alone), {0: 1.0}
    for lowest in range(1, 1 << num_members):
        inside = [member for member in range(num_members) if lowest >> member & 1]
        outside = [member for member in range(num_members) if not lowest >> member & 1]
        pairs = (shared.sum() - shared[np.ix_(outside, outside)].sum()) // 2
        exponent = len(inside) + alone[inside].sum() + pairs
        means[lowest] = sum(means[lowest ^ 1 << last] for last in inside) / float(exponent)
    return means[(1 << num_members) - 1]
