"""Zero-shot multi-label classification, where an item may have several classes or none.

Each class embedding is a query that should rank the items of its class before all others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import (
    ROUNDING,
    Bootstrap,
    Interval,
    Score,
    no_interval,
    percentile_interval,
    score_without_interval,
)
from eval.metrics.ranked_relevance import ranked_relevance, relevance_at_chance
from eval.metrics.ranking import check_finite, cosine_scores

CLASSES_AT_ONCE = 64
MIN_CLASS_ITEMS = 5  # fewest items of a class; one in a hundred resamples lacks a class of five
MIN_LABELS = 20  # fewest items of all classes
MAX_CLASSES = 5  # every class has the same bias, which the average over many classes shows
MAX_UNCHANGED = 0.0025  # fraction of resamples without a change, as if six items changed


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
) -> MultiLabelResult:
    """Computes mean average precision over the classes that have items.

    clip_benchmark counts classes without items as 0. There is no interval, because the expected
    average precision is higher for fewer items. A bootstrap of classes of 20 items covers the
    average precision of all possible items in 85 % of experiments.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        class_embeddings: [K, D], L2-normalised.
        is_of_class: bool [Q, K]; at least one class has an item.

    Raises:
        ValueError: if an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(class_embeddings, name="class_embeddings")
    present = np.flatnonzero(is_of_class.any(axis=0))
    precisions = []
    for classes in np.array_split(present, -(-len(present) // CLASSES_AT_ONCE)):
        embeddings = class_embeddings[torch.from_numpy(classes).to(class_embeddings.device)]
        scores = cosine_scores(embeddings, media_embeddings).cpu().numpy()  # [classes, Q]
        of_class = is_of_class[:, classes].T
        precisions.append(average_precisions(scores, of_class))
    num_items = is_of_class[:, present].sum(axis=0)
    chance = relevance_at_chance(num_items, gallery_size=len(is_of_class)).average_precision()
    found = np.full(is_of_class.shape[1], np.nan)
    found[present] = np.concatenate(precisions)
    score = score_without_interval(
        found[present].mean(), chance.mean(), len(is_of_class), reason="biased"
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


def difference_interval(
    first: np.ndarray, second: np.ndarray, of_class: np.ndarray, bootstrap: Bootstrap
) -> Interval:
    """Computes the interval of the difference in mean average precision of two models.

    The expected difference of few items is smaller than that of many. For one class of up to a
    hundred items, this bias is an eighth of the standard error.

    Args:
        first: [classes, Q] scores of the first model.
        second: [classes, Q] scores of the second model.
        of_class: bool [classes, Q]; every class has an item.
        bootstrap: number of resamples and seed.
    """
    sizes = of_class.sum(axis=1)
    if sizes.min() < MIN_CLASS_ITEMS:
        return no_interval(f"a class of fewer than {MIN_CLASS_ITEMS} items")
    if sizes.sum() < MIN_LABELS:
        return no_interval(f"fewer than {MIN_LABELS} labels")
    if len(sizes) > MAX_CLASSES:
        return no_interval(f"biased for more than {MAX_CLASSES} classes")
    resampled = resampled_precisions(second, of_class, bootstrap)
    resampled -= resampled_precisions(first, of_class, bootstrap)
    differences = np.nanmean(resampled, axis=0)
    if (np.abs(differences) < ROUNDING).mean() > MAX_UNCHANGED:
        return no_interval("few items changed")
    return percentile_interval(differences, num_items=sizes.sum(), num_classes=len(sizes))


def resampled_precisions(
    scores: np.ndarray, of_class: np.ndarray, bootstrap: Bootstrap
) -> np.ndarray:
    """Computes average precisions on bootstrap resamples of the items.

    All classes use the same draws. Ties are averaged over all orders.

    Args:
        scores: [classes, Q] score of every item for every class.
        of_class: bool [classes, Q]; every class has an item.
        bootstrap: number of resamples and seed.

    Returns:
        [classes, resamples] float64; NaN if no item of the class was drawn.
    """
    generator = np.random.default_rng(bootstrap.seed)
    num_classes, num_items = scores.shape
    order = np.argsort(-scores, axis=1, kind="stable")
    is_relevant = np.take_along_axis(of_class, order, axis=1)
    classes, positions = np.nonzero(is_relevant)  # [P]
    first, stop = (
        bounds[classes, positions]
        for bounds in _tie_bounds(np.take_along_axis(scores, order, axis=1))
    )
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, num_items + 2))])
    before, relevant_before = np.zeros((2, num_classes, num_items + 1), dtype=np.int64)
    precisions = np.empty((num_classes, bootstrap.num_samples))
    for sample in range(bootstrap.num_samples):
        drawn = np.bincount(generator.integers(num_items, size=num_items), minlength=num_items)
        times = drawn[order]  # [classes, Q]
        np.cumsum(times, axis=1, out=before[:, 1:])
        np.cumsum(times * is_relevant, axis=1, out=relevant_before[:, 1:])
        copies = times[classes, positions]  # [P]
        # Copies of an item do not count as relevant to one another. Otherwise resamples would score
        # better, on average, than the original items.
        above, relevant_above = before[classes, first], relevant_before[classes, first]
        tied = before[classes, stop] - above - copies
        relevant_tied = relevant_before[classes, stop] - relevant_above - copies
        # Mean of (relevant_above + 1 + i * relevant_tied / tied) / (above + 1 + i) over i = 0..tied
        slope = relevant_tied / np.maximum(tied, 1)
        height = relevant_above + 1 - slope * (above + 1)
        precision = slope + height * (harmonic[above + tied + 1] - harmonic[above]) / (tied + 1)
        sums = np.bincount(classes, weights=copies * precision, minlength=num_classes)
        with np.errstate(invalid="ignore"):
            precisions[:, sample] = sums / relevant_before[:, -1]
    return precisions


def _tie_bounds(ranked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first position of each position's tie and the position after its last.

    Args:
        ranked: [classes, Q] scores in descending order.

    Returns:
        Two int64 [classes, Q].
    """
    num_items = ranked.shape[1]
    positions = np.broadcast_to(np.arange(num_items), ranked.shape)
    is_new = np.ones(ranked.shape, dtype=bool)
    is_new[:, 1:] = ranked[:, 1:] != ranked[:, :-1]
    first = np.maximum.accumulate(np.where(is_new, positions, 0), axis=1)
    is_last = np.roll(is_new, -1, axis=1)  # the last position precedes the first one of a row
    after = np.where(is_last, positions + 1, num_items)
    return first, np.minimum.accumulate(after[:, ::-1], axis=1)[:, ::-1]
