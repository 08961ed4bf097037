"""Zero-shot multi-label classification, where an item may have several classes or none.

Each class embedding is a query that should rank the items of its class before all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import Bootstrap, Score, percentile_interval
from eval.metrics.ranked_relevance import ranked_relevance, relevance_at_chance
from eval.metrics.ranking import check_finite, cosine_scores

CLASSES_AT_ONCE = 64


@dataclass(frozen=True)
class MultiLabelResult:
    """Metrics of one multi-label classification."""

    scores: dict[str, Score]
    average_precisions: np.ndarray  # [K]; NaN for classes without items


def classify_labels(
    media_embeddings: Tensor,
    class_embeddings: Tensor,
    *,
    is_of_class: np.ndarray,
    bootstrap: Bootstrap,
) -> MultiLabelResult:
    """Computes mean average precision over the classes that have items.

    The interval is a bootstrap over items. clip_benchmark counts classes without items as 0.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        class_embeddings: [K, D], L2-normalised.
        is_of_class: bool [Q, K]; at least one class has an item.
        bootstrap: resampling of items for the interval.

    Raises:
        ValueError: if an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(class_embeddings, name="class_embeddings")
    present = np.flatnonzero(is_of_class.any(axis=0))
    precisions, resampled = [], []
    for classes in np.array_split(present, -(-len(present) // CLASSES_AT_ONCE)):
        embeddings = class_embeddings[torch.from_numpy(classes).to(class_embeddings.device)]
        scores = cosine_scores(embeddings, media_embeddings).cpu().numpy()  # [classes, Q]
        of_class = is_of_class[:, classes].T
        precisions.append(average_precisions(scores, of_class))
        resampled.append(resampled_precisions(scores, of_class, bootstrap))
    low, high = percentile_interval(np.nanmean(np.concatenate(resampled), axis=0))
    num_items = is_of_class[:, present].sum(axis=0)
    chance = relevance_at_chance(num_items, gallery_size=len(is_of_class)).average_precision()
    found = np.full(is_of_class.shape[1], np.nan)
    found[present] = np.concatenate(precisions)
    value = float(found[present].mean())
    score = Score(
        value, low, high, float(chance.mean()), len(is_of_class), "bootstrap over media items"
    )
    return MultiLabelResult({"mean_average_precision": score}, found)


def average_precisions(scores: np.ndarray, of_class: np.ndarray) -> np.ndarray:
    """Computes the average precision of each class, used as a query for its items.

    Args:
        scores: [classes, Q] score of every item for every class.
        of_class: bool [classes, Q]; every class has an item.

    Returns:
        [classes] float64.
    """
    above, tied = [], []
    for row, is_relevant in zip(scores, of_class, strict=True):
        irrelevant, own = np.sort(row[~is_relevant]), row[is_relevant]
        first, stop = (np.searchsorted(irrelevant, own, side=side) for side in ("left", "right"))
        above.append(len(irrelevant) - stop)
        tied.append(stop - first)
    query, item = np.nonzero(of_class)
    ranked = ranked_relevance(
        query,
        scores[query, item],
        num_irrelevant_above=np.concatenate(above),
        num_irrelevant_tied=np.concatenate(tied),
        gallery_size=scores.shape[1],
    )
    return ranked.average_precision()


def resampled_precisions(
    scores: np.ndarray, of_class: np.ndarray, bootstrap: Bootstrap
) -> np.ndarray:
    """Computes average precisions on bootstrap resamples of the items.

    All classes use the same draws.

    Args:
        scores: [classes, Q] score of every item for every class.
        of_class: bool [classes, Q]; every class has an item.
        bootstrap: number of resamples and seed.

    Returns:
        [classes, resamples] float64; NaN if no item of the class was drawn.
    """
    generator = np.random.default_rng(bootstrap.seed)
    num_items = scores.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")
    is_relevant = np.take_along_axis(of_class, order, axis=1)
    precisions = np.empty((len(scores), bootstrap.num_samples))
    for sample in range(bootstrap.num_samples):
        drawn = np.bincount(generator.integers(num_items, size=num_items), minlength=num_items)
        times = drawn[order]  # [classes, Q]
        relevant = times * is_relevant
        num_relevant = relevant.sum(axis=1)
        # Copies of an item do not count as relevant to one another. Otherwise resamples would score
        # better, on average, than the original items.
        earlier = times.cumsum(axis=1) - times
        relevant_earlier = relevant.cumsum(axis=1) - relevant
        precision = (relevant_earlier + 1) / (earlier + 1)
        with np.errstate(invalid="ignore"):
            precisions[:, sample] = (relevant * precision).sum(axis=1) / num_relevant
    return precisions
