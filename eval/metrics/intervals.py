"""95 % confidence intervals, chosen by simulation (tests/benchmarks/coverage.py).

    counts of hits        Wilson's score interval
    means over items      Wilson's with an effective number of items. The captions of one media item
                          succeed or fail together, so they count as one cluster.
    means over classes    Wilson's with an effective number of items, by the variance within classes
    paired differences    a score interval like Tango's, over clusters

Some metrics have no interval, because none covers the truth as often as it says. These are ranks,
macro F1, the accuracy of the worst group, mean average precision over classes, and means over very
few items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054  # 97.5 % quantile of the standard normal
MIN_CLUSTERS = 20  # fewest items of an interval of a mean
MIN_CLASS_TRIALS = 10  # fewest items, in effect, of an interval of a mean over classes
NO_INTERVAL = "none"


@dataclass(frozen=True)
class Score:
    """Value of one metric, with its uncertainty and chance level."""

    value: float
    low: float | None  # 95 % interval; None: no interval of this metric can be trusted
    high: float | None
    chance: float  # expected value of random embeddings
    num_queries: int
    interval: str  # method of the interval


@dataclass(frozen=True)
class Bootstrap:
    """Bootstrap settings."""

    num_samples: int = 1000
    seed: int = 0


def wilson_interval(num_hits: float, num_trials: float) -> tuple[float, float]:
    """Computes the Wilson score interval of a proportion (Wilson 1927).

    Unlike the normal approximation, it has a positive width at 0 and 1.

    Args:
        num_hits: from 0 to num_trials; may be fractional because of ties.
        num_trials: positive; may be fractional, as an effective number of trials.
    """
    rate, z2 = num_hits / num_trials, NORMAL_QUANTILE**2
    center = rate + z2 / (2 * num_trials)
    variance = max(0.0, rate * (1 - rate)) / num_trials
    spread = NORMAL_QUANTILE * np.sqrt(variance + z2 / (4 * num_trials**2))
    scale = 1 + z2 / num_trials
    low, high = float((center - spread) / scale), float((center + spread) / scale)
    # The bound at a rate of 0 or 1 is exact; rounding errors would move it.
    return max(0.0, low) if rate > 0 else 0.0, min(1.0, high) if rate < 1 else 1.0


def mean_score(values: np.ndarray, *, chance: float, clusters: np.ndarray | None = None) -> Score:
    """Computes the mean of values in [0, 1], with its interval.

    Args:
        values: [n], one per query.
        chance: expected value of random embeddings.
        clusters: [n] media item of each query, numbered from 0 without gaps; None: each query is
            its own cluster.
    """
    if clusters is None:
        clusters = np.arange(len(values))
    low, high, method = mean_interval([(values, clusters)])
    return Score(float(values.mean()), low, high, chance, len(values), method)


def mean_interval(
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[float | None, float | None, str]:
    """Computes the interval of the mean, over the parts, of the mean of each part.

    Args:
        parts: ([n] values in [0, 1], [n] clusters) of each part. Clusters are numbered from 0
            without gaps, and equal numbers are the same media item in all parts.

    Returns:
        (low, high, method); None twice if there are too few clusters.
    """
    mean = float(np.mean([values.mean() for values, _ in parts]))
    num_clusters = int(parts[0][1].max()) + 1
    values = parts[0][0]
    if len(parts) == 1 and num_clusters == len(values) and np.isin(values, (0, 1)).all():
        return *wilson_interval(values.sum(), len(values)), "Wilson"
    if num_clusters < MIN_CLUSTERS:
        return None, None, NO_INTERVAL
    squares = np.square(np.mean([cluster_deviations(*part) for part in parts], axis=0))
    bound = mean * (1 - mean)  # largest variance of values with this mean
    if bound <= 0 or not squares.any():
        return *wilson_interval(mean * num_clusters, num_clusters), "Wilson over media items"
    # A few deviating clusters, such as the failures of a good model, say little about the variance.
    # It is therefore averaged with its bound, which weighs as much as one deviating cluster.
    num_deviating = squares.sum() ** 2 / np.square(squares).sum()
    variance = num_deviating * squares.sum() / (num_clusters - 1) + bound
    num_trials = num_clusters * bound * (num_deviating + 1) / variance
    return *wilson_interval(mean * num_trials, num_trials), "Wilson over media items"


def cluster_deviations(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Computes how far each cluster moves the mean of values: float64 [clusters].

    The variance of the mean is about their mean square divided by the number of clusters.

    Args:
        values: [n]
        clusters: [n] cluster of each value, numbered from 0 without gaps.
    """
    sums = np.bincount(clusters, weights=values - values.mean())
    return sums * len(sums) / len(values)


def class_mean_interval(
    recalls: np.ndarray, *, class_sizes: np.ndarray
) -> tuple[float | None, float | None, str]:
    """Computes the interval of the mean of class recalls, for the given numbers of items.

    The variance within a class is that of its recall, shrunk towards the mean by two items and
    corrected for the variance that this removes. It is thus positive for a class of one item.

    Args:
        recalls: [classes present] mean hit of each class.
        class_sizes: [classes present] number of items of each class, at least 1.

    Returns:
        (low, high, method); None twice if there are too few items.
    """
    mean, num_classes = float(recalls.mean()), len(recalls)
    if num_classes / (1 / class_sizes).mean() < MIN_CLASS_TRIALS:
        return None, None, NO_INTERVAL
    shrunk = (class_sizes * recalls + 2 * mean) / (class_sizes + 2)
    correction = 1 - class_sizes / (class_sizes + 2) ** 2
    variance = (shrunk * (1 - shrunk) / class_sizes / correction).sum() / num_classes**2
    bound = mean * (1 - mean)
    num_trials = bound / variance if bound > 0 else num_classes / (1 / class_sizes).mean()
    return *wilson_interval(mean * num_trials, num_trials), "Wilson over items of classes"


def paired_interval(differences: np.ndarray, *, clusters: np.ndarray) -> tuple[float, float]:
    """Computes the interval of the mean of paired differences in [-1, 1].

    It is a score interval like that of Tango 1998. A mean is inside if the observed one is within
    1.96 standard errors. Their variance is the observed one, but at least that of the fewest
    changes that give this mean. Without a single change, the interval thus has a width.

    Args:
        differences: [n]
        clusters: [n] media item of each difference, numbered from 0 without gaps.
    """
    mean = float(differences.mean())
    deviations = cluster_deviations(differences, clusters)
    square = float(np.square(deviations).mean()) + mean**2
    ratio = NORMAL_QUANTILE**2 / len(deviations)
    spread = np.sqrt(max(0.0, mean**2 - (1 + ratio) * (mean**2 - ratio * square)))
    low, high = (mean - spread) / (1 + ratio), (mean + spread) / (1 + ratio)
    low = min(low, -_fewest_changes(-mean, ratio))
    high = max(high, _fewest_changes(mean, ratio))
    return max(-1.0, float(low)), min(1.0, float(high))


def _fewest_changes(mean: float, ratio: float) -> float:
    """Solves (mean - x)^2 = ratio * (x - x^2) for the largest x; -1 if there is none."""
    discriminant = ratio * (ratio + 4 * mean * (1 - mean))
    if discriminant < 0:
        return -1.0
    return (2 * mean + ratio + np.sqrt(discriminant)) / (2 * (1 + ratio))


def percentile_interval(statistics: np.ndarray) -> tuple[float, float]:
    """Computes the interval (low, high) of a statistic from its [resamples] bootstrap values."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high)
