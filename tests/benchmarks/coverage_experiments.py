"""Experiments of coverage.py: each draws a model and a test set, and computes one interval.

Every experiment takes a generator and its conditions, and returns (low, high, true metric).
"""

from __future__ import annotations

from functools import cache

import numpy as np
from scipy.stats import norm

from eval.metrics.intervals import (
    Bootstrap,
    Score,
    class_mean_interval,
    hits_interval,
    mean_interval,
    mean_score,
    paired_interval,
)
from eval.metrics.multi_label import difference_interval
from eval.report.averages import mean_of_scores

Measured = tuple[float | None, float | None, float]


def accuracy(rng: np.random.Generator, size: int, rates: tuple[float, float]) -> Measured:
    """Draws hits of independent items, as in accuracies and group scores.

    Args:
        rng: generator.
        size: number of items.
        rates: range of the true accuracy, which is drawn.
    """
    rate = rng.uniform(*rates)
    low, high, _ = hits_interval(rng.binomial(size, rate), size)
    return low, high, rate


def average(rng: np.random.Generator, num_evaluations: int, rates: tuple[float, float]) -> Measured:
    """Draws accuracies of evaluations of 20 to 2,000 items, and averages them."""
    true = rng.uniform(*rates, num_evaluations)
    sizes = np.exp(rng.uniform(np.log(20), np.log(2000), num_evaluations)).astype(int)
    scores: list[Score] = [
        mean_score((rng.random(size) < rate).astype(float), chance=0.1, are_hits=True)
        for size, rate in zip(sizes, true, strict=True)
    ]
    score = mean_of_scores(scores)
    return score.low, score.high, float(true.mean())


def class_recall(
    rng: np.random.Generator, num_classes: int, size: int | None, rates: tuple[float, float]
) -> Measured:
    """Draws recalls of classes with their own rates; unequal classes have 11 items on average."""
    sizes = np.full(num_classes, size) if size else np.minimum(rng.geometric(0.09, num_classes), 60)
    of_class = rng.beta(*rates, num_classes)
    recalls = rng.binomial(sizes, of_class) / sizes
    low, high, _ = class_mean_interval(recalls, class_sizes=sizes)
    return low, high, float(of_class.mean())


def clusters_of_captions(
    rng: np.random.Generator, num_items: int, captions: tuple[int, int]
) -> np.ndarray:
    """Draws the number of captions of each item, and returns each caption's item."""
    return np.repeat(np.arange(num_items), rng.integers(captions[0], captions[1] + 1, num_items))


def recall(
    rng: np.random.Generator,
    num_items: int,
    captions: tuple[int, int],
    rates: tuple[float, float],
    likeness: float,
    *,
    both_directions: bool = False,
) -> Measured:
    """Draws hits of captions, whose rate is that of their item.

    Args:
        rng: generator.
        num_items: number of media items.
        captions: fewest and most captions of an item.
        rates: range of the true recall, which is drawn.
        likeness: sum of the parameters of the beta distribution of the items' rates.
        both_directions: whether to add hits of the items, with the same rates.
    """
    rate = rng.uniform(*rates)
    clusters = clusters_of_captions(rng, num_items, captions)
    of_item = rng.beta(rate * likeness, (1 - rate) * likeness, num_items)
    parts = [
        ((rng.random(len(each)) < of_item[each]).astype(float), each)
        for each in ([np.arange(num_items)] if both_directions else []) + [clusters]
    ]
    low, high, _ = mean_interval(parts, are_hits=True)
    return low, high, rate


def reciprocal_ranks(
    rng: np.random.Generator, num_items: int, mean: float, spread: float
) -> Measured:
    """Draws reciprocals of log-normal ranks, as in the ranking metrics of single captions."""
    ranks = np.ceil(np.exp(rng.normal(mean, spread, num_items))).clip(1)
    low, high, _ = mean_interval([(1 / ranks, np.arange(num_items))])
    return low, high, mean_reciprocal(mean, spread)


@cache
def mean_reciprocal(mean: float, spread: float) -> float:
    """Computes the expected reciprocal of the rounded log-normal ranks, by integration."""
    points = (np.arange(200_000) + 0.5) / 200_000 * 16 - 8  # standard deviations
    weights = np.exp(-np.square(points) / 2)
    ranks = np.ceil(np.exp(mean + spread * points)).clip(1)
    return float((weights / ranks).sum() / weights.sum())


def jaccard(
    rng: np.random.Generator, num_items: int, chances: tuple[float, float, float]
) -> Measured:
    """Draws Jaccard indices of two chosen among five."""
    values = np.array([0, 1 / 3, 1])
    low, high, _ = mean_interval([(rng.choice(values, num_items, p=chances), np.arange(num_items))])
    return low, high, float(values @ chances)


def hit_difference(
    rng: np.random.Generator,
    num_items: int,
    captions: tuple[int, int],
    unit: str,
    changes: tuple[int, int],
) -> Measured:
    """Draws differences of hits.

    Args:
        rng: generator.
        num_items: number of media items.
        captions: fewest and most captions of an item.
        unit: "captions": each changes alone, and only those of half of the items, twice as
            often; "items": all captions of an item change alike.
        changes: number of items that are expected to become better, and worse.
    """
    clusters = clusters_of_captions(rng, num_items, captions)
    if unit == "items":
        draws, factor = rng.random(num_items)[clusters], 1
    else:
        draws, factor = rng.random(len(clusters)), 2 * rng.integers(0, 2, num_items)[clusters]
    better, worse = (number / num_items * factor for number in changes)
    is_better = draws < better
    is_worse = ~is_better & (draws < better + worse)
    differences = is_better.astype(float) - is_worse
    low, high, _ = paired_interval(differences, clusters=clusters)
    return low, high, (changes[0] - changes[1]) / num_items


def draw_difference(rng: np.random.Generator, num_items: int, gain: float) -> Measured:
    """Draws differences of few-shot accuracies, which are means of hits over five draws."""
    rates = rng.beta(2, 2, num_items)
    first, second = (rng.binomial(5, rate) / 5 for rate in (rates, rates + gain * (1 - rates)))
    low, high, _ = paired_interval(second - first, clusters=np.arange(num_items))
    return low, high, gain / 2


def precision_difference(
    rng: np.random.Generator, num_classes: int, num_positives: int, gain: float
) -> Measured:
    """Draws two models, and compares their mean average precisions."""
    first, second, of_class = class_scores(rng, num_classes, 10 * num_positives, gain)
    low, high, _ = difference_interval(
        first, second, of_class, Bootstrap(200, seed=int(rng.integers(1 << 30)))
    )
    return low, high, true_precision(1 + gain) - true_precision(1.0)


def class_scores(
    rng: np.random.Generator, num_classes: int, num_items: int, gain: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws scores of two models and the classes of items, [num_classes, num_items] each."""
    of_class = rng.random((num_classes, num_items)) < 0.1
    shared = rng.normal(0, 0.7, of_class.shape)
    first, second = (
        (shared + rng.normal(0, 0.7, of_class.shape) + shift * of_class).astype(np.float32)
        for shift in (1, 1 + gain)
    )
    return first, second, of_class


@cache
def true_precision(shift: float) -> float:
    """Computes the average precision over all possible items, by integration."""
    spread, fractions = np.sqrt(2) * 0.7, (np.arange(400_000) + 0.5) / 400_000
    scores = shift + spread * norm.ppf(fractions)
    right, wrong = 0.1 * (1 - fractions), 0.9 * norm.sf(scores, 0, spread)
    return float((right / (right + wrong)).mean())
