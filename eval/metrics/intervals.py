"""95 % confidence intervals, chosen by simulation (tests/benchmarks/coverage.py).

    counts of hits        Wilson's score interval
    means over items      Wilson's with an effective number of items. The captions of one media item
                          succeed or fail together, so they count as one cluster.
    means over classes    Wilson's with an effective number of items, by the variance within classes
    paired differences    Tango's score interval over clusters, given that enough items changed

Every function returns (low, high, method). Where no interval covers the truth as often as it says,
both ends are None and the method is "none" with the reason. The reason depends on counts and sizes
only. Ranks, macro F1, the accuracy of the worst group and mean average precision never have one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammainc, ndtr, ndtri, stdtrit

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054  # 97.5 % quantile of the standard normal
MIN_TRIALS = 5  # fewest trials of an interval of a count
MIN_CLUSTERS = 30  # fewest items of an interval of a mean or difference
MIN_CHANGES = 6  # fewest changed items, in effect, of an interval of a difference
MIN_CLASS_TRIALS = 30  # fewest items, in effect, of an interval of a mean over classes
BOUND_CLUSTERS = 0.75  # weight of the largest variance of a mean, as a number of deviating items
BOUND_CLASSES = 2.0  # weight of the largest variance of a mean over classes
ROUNDING = 1e-12  # smaller deviations are rounding errors

Interval = tuple[float | None, float | None, str]  # (low, high, method)


def no_interval(reason: str) -> Interval:
    """Returns the interval of a metric that has none, with the reason in place of the method."""
    return None, None, f"none: {reason}"


@dataclass(frozen=True)
class Score:
    """Value of one metric, with its uncertainty and chance level."""

    value: float
    low: float | None  # 95 % interval; None: no interval can be trusted
    high: float | None
    chance: float  # expected value of random embeddings
    num_queries: int
    interval: str  # method of the interval; "none: " and the reason if there is none


def score_without_interval(value: float, chance: float, num_queries: int, *, reason: str) -> Score:
    """Returns the score of a metric that never has an interval."""
    low, high, method = no_interval(reason)
    return Score(float(value), low, high, float(chance), num_queries, method)


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


def trials_of_interval(rate: float, low: float, high: float) -> float:
    """Returns the number of trials for which `wilson_interval` of a rate is (low, high)."""
    end = low if rate > 0.5 else high
    return NORMAL_QUANTILE**2 * end * (1 - end) / (end - rate) ** 2


def hits_interval(num_hits: float, num_trials: int) -> Interval:
    """Computes the interval of a fraction of independent hits.

    Args:
        num_hits: from 0 to num_trials.
        num_trials: at least 1.
    """
    if num_trials < MIN_TRIALS:
        return no_interval(f"fewer than {MIN_TRIALS} items")
    return *wilson_interval(num_hits, num_trials), "Wilson"


def mean_score(
    values: np.ndarray,
    *,
    chance: float,
    clusters: np.ndarray | None = None,
    are_hits: bool = False,
) -> Score:
    """Computes the mean of values in [0, 1], with its interval.

    Args:
        values: [n], one per query.
        chance: expected value of random embeddings.
        clusters: [n] media item of each query, numbered from 0 without gaps; None: each query is
            its own cluster.
        are_hits: see `mean_interval`.
    """
    if clusters is None:
        clusters = np.arange(len(values))
    low, high, method = mean_interval([(values, clusters)], are_hits=are_hits)
    return Score(float(values.mean()), low, high, chance, len(values), method)


def mean_interval(
    parts: Sequence[tuple[np.ndarray, np.ndarray]], *, are_hits: bool = False
) -> Interval:
    """Computes the interval of the mean, over the parts, of the mean of each part.

    Args:
        parts: ([n] values in [0, 1], [n] clusters) of each part. Clusters are numbered from 0
            without gaps, and equal numbers are the same media item in all parts.
        are_hits: whether every value is 0 or 1, except for ties. The count of a few hits has an
            interval; the mean of a few other values has none.
    """
    mean = float(np.mean([values.mean() for values, _ in parts]))
    num_clusters = int(parts[0][1].max()) + 1
    values = parts[0][0]
    is_single = len(parts) == 1 and num_clusters == len(values)
    is_count = is_single and bool(np.isin(values, (0, 1)).all())
    if num_clusters < MIN_CLUSTERS and not (is_count and are_hits):
        return no_interval(f"fewer than {MIN_CLUSTERS} items")
    if is_count:
        return hits_interval(values.sum(), len(values))
    squares = np.square(np.mean([cluster_deviations(*part) for part in parts], axis=0))
    bound = mean * (1 - mean)  # largest variance of values with this mean
    num_trials = num_clusters
    if bound > 0 and squares.any():
        # A few deviating clusters, such as the failures of a good model, say little about the
        # variance. It is therefore averaged with its bound.
        num_deviating = squares.sum() ** 2 / np.square(squares).sum()
        variance = num_deviating * squares.sum() / (num_clusters - 1) + BOUND_CLUSTERS * bound
        num_trials *= bound * (num_deviating + BOUND_CLUSTERS) / variance
    return *wilson_interval(mean * num_trials, num_trials), "Wilson over media items"


def cluster_deviations(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """Computes how far each cluster moves the mean of values: float64 [clusters].

    The variance of the mean is about their mean square divided by the number of clusters.

    Args:
        values: [n]
        clusters: [n] cluster of each value, numbered from 0 without gaps.
    """
    sums = np.bincount(clusters, weights=values - values.mean())
    deviations = sums * len(sums) / len(values)
    return np.where(np.abs(deviations) < ROUNDING, 0.0, deviations)


def class_mean_interval(recalls: np.ndarray, *, class_sizes: np.ndarray) -> Interval:
    """Computes the interval of the mean of class recalls, for the given numbers of items.

    The variance within a class of several items is estimated without bias. Classes of one item
    are given the mean of the others.

    Args:
        recalls: [classes present] mean hit of each class.
        class_sizes: [classes present] number of items of each class, at least 1; may be
            fractional, as an effective number of items.
    """
    mean, num_classes = float(recalls.mean()), len(recalls)
    is_single = class_sizes == 1
    trials_at_most = num_classes / (1 / class_sizes).mean()  # if all classes had the same recall
    if trials_at_most < MIN_CLASS_TRIALS:
        return no_interval(f"fewer than {MIN_CLASS_TRIALS} items in effect")
    if is_single.mean() > 0.5:
        return no_interval("most classes have one item")
    bound = mean * (1 - mean)
    num_trials = trials_at_most
    if bound > 0:
        # Variance of one hit, by class
        within = recalls * (1 - recalls) * class_sizes / np.maximum(class_sizes - 1, 1)
        within[is_single] = within[~is_single].mean()
        fraction = (within / class_sizes).mean() / (bound * (1 / class_sizes).mean())
        # Only classes with hits and misses show their variance. If the mean makes few of them
        # likely, the fraction says little. It is therefore averaged with its bound, 1.
        num_shown = np.minimum(class_sizes * bound, BOUND_CLASSES)[~is_single].sum()
        num_trials *= (num_shown + BOUND_CLASSES) / (num_shown * fraction + BOUND_CLASSES)
    return *wilson_interval(mean * num_trials, num_trials), "Wilson over classes"


def paired_interval(differences: np.ndarray, *, clusters: np.ndarray) -> Interval:
    """Computes the interval of the mean of paired differences in [-1, 1].

    It is the score interval of Tango 1998, with a design effect for clusters. Each difference is
    tested given that enough items change for an interval. Otherwise the intervals that are given
    would exaggerate small differences.

    Args:
        differences: [n]
        clusters: [n] media item of each difference, numbered from 0 without gaps.
    """
    num_clusters = int(clusters.max()) + 1
    if num_clusters < MIN_CLUSTERS:
        return no_interval(f"fewer than {MIN_CLUSTERS} items")
    mean = float(differences.mean())
    sums = np.bincount(clusters, weights=differences)
    changed = float(np.abs(sums).sum()) / len(differences)  # fraction of items that change
    variance = float(np.square(cluster_deviations(differences, clusters)).mean())
    # Variance relative to that of items that change by 1 or not at all
    effect = variance / (changed - mean**2) if variance > 0 else 1.0
    if effect < 1:  # estimated, unlike that of changes by 1: widened by Student's t
        freedom = num_clusters - 1
        ratio = stdtrit(freedom, (1 + CONFIDENCE) / 2) / NORMAL_QUANTILE
        effect = min(1.0, effect * ratio**2 * num_clusters / freedom)
    if num_clusters * changed / effect < MIN_CHANGES - ROUNDING:
        return no_interval(f"fewer than {MIN_CHANGES} items changed")

    def is_accepted(x: float) -> bool:
        # Likeliest fraction of changed items, if the true mean is x
        total = (changed + np.sqrt(max(0.0, changed**2 + 4 * x * (x - mean)))) / 2
        enough = gammainc(MIN_CHANGES, num_clusters * total / effect)  # Poisson probability
        quantile = -ndtri((1 - CONFIDENCE) / 2 * enough)
        return (x - mean) ** 2 <= quantile**2 * effect * max(0.0, total - x**2) / num_clusters

    low, high = (_last_accepted(is_accepted, mean, end) for end in (-1.0, 1.0))
    return low, high, "Tango over media items"


def _last_accepted(is_accepted: Callable[[float], bool], inside: float, outside: float) -> float:
    """Searches the border of an interval by bisection."""
    if is_accepted(outside):
        return outside
    while abs(outside - inside) > ROUNDING:
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if is_accepted(middle) else (inside, middle)
    return inside


def percentile_interval(statistics: np.ndarray, *, num_items: int, num_classes: int) -> Interval:
    """Computes the interval of a mean over classes from its bootstrap values.

    The percentiles are expanded for few items (Hesterberg 2015, section 5.3).

    Args:
        statistics: [resamples] values.
        num_items: number of items in all classes.
        num_classes: number of classes.
    """
    freedom = num_items - num_classes
    quantile = stdtrit(freedom, (1 - CONFIDENCE) / 2) * np.sqrt(num_items / freedom)
    tail = 100 * ndtr(quantile)
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high), "expanded bootstrap percentiles"
