"""Zero-shot classification where an item may be of several classes, or of none: how well each class
embedding ranks the items of its class before the others."""

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
    """The metrics of one classification with several classes per item."""

    scores: dict[str, Score]
    average_precisions: np.ndarray  # [K]; NaN where the dataset has no item of the class


def classify_labels(
    media_embeddings: Tensor,
    class_embeddings: Tensor,
    *,
    is_of_class: np.ndarray,
    bootstrap: Bootstrap,
) -> MultiLabelResult:
    """Mean average precision over the classes that have items (clip_benchmark counts the others as
    0), with an interval by resampling items.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        class_embeddings: [K, D], L2-normalised.
        is_of_class: bool [Q, K]; some class has an item.
        bootstrap: of the interval.

    Raises:
        ValueError: an embedding is not finite.
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
    """[classes] of each class as a query for its items, among all.

    Args:
        scores: [classes, Q] of every item for every class.
        of_class: bool [classes, Q]; every class has an item.
    """
    above, level = [], []
    for row, is_right in zip(scores, of_class, strict=True):
        wrong, own = np.sort(row[~is_right]), row[is_right]
        first, stop = (np.searchsorted(wrong, own, side=side) for side in ("left", "right"))
        above.append(len(wrong) - stop)
        level.append(stop - first)
    query, item = np.nonzero(of_class)
    answers = ranked_relevance(
        query,
        scores[query, item],
        num_irrelevant_above=np.concatenate(above),
        num_irrelevant_tied=np.concatenate(level),
        gallery_size=scores.shape[1],
    )
    return answers.average_precision()


def resampled_precisions(
    scores: np.ndarray, of_class: np.ndarray, bootstrap: Bootstrap
) -> np.ndarray:
    """[classes, resamples] average precision with items drawn anew; NaN where none of the class
    was drawn. Every class sees the same draws."""
    generator = np.random.default_rng(bootstrap.seed)
    num_items = scores.shape[1]
    order = np.argsort(-scores, axis=1, kind="stable")
    is_right = np.take_along_axis(of_class, order, axis=1)
    precisions = np.empty((len(scores), bootstrap.num_samples))
    for place in range(bootstrap.num_samples):
        drawn = np.bincount(generator.integers(num_items, size=num_items), minlength=num_items)
        times = drawn[order]  # [classes, Q]
        right = times * is_right
        num_relevant = right.sum(axis=1)
        # Copies of one item are not counted among each other, as the item itself counts once:
        # else resamples would on average be better than what they are drawn from.
        earlier, right_earlier = times.cumsum(axis=1) - times, right.cumsum(axis=1) - right
        precision = (right_earlier + 1) / (earlier + 1)
        with np.errstate(invalid="ignore"):
            precisions[:, place] = (right * precision).sum(axis=1) / num_relevant
    return precisions
