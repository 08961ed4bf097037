"""95 % confidence intervals: Wilson's for proportions, a bootstrap over media items for retrieval.

The captions of one media item succeed or fail together, so the bootstrap resamples items.
Resampling captions would give intervals that are far too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
NORMAL_QUANTILE = 1.959963984540054  # 97.5 % quantile of the standard normal

# (values [n], number of times each was drawn [n] int64) -> statistic
Statistic = Callable[[np.ndarray, np.ndarray], float]


@dataclass(frozen=True)
class Score:
    """Value of one metric, with its uncertainty and chance level."""

    value: float
    low: float | None  # 95 % interval; None: no interval of this metric would be honest
    high: float | None
    chance: float  # expected value of random embeddings
    num_queries: int
    interval: str  # method of the interval


@dataclass(frozen=True)
class Bootstrap:
    """Bootstrap settings."""

    num_samples: int = 1000
    seed: int = 0


def wilson_interval(num_hits: float, num_trials: int) -> tuple[float, float]:
    """Computes the Wilson score interval of a proportion (Wilson 1927).

    Unlike the normal approximation, it has a positive width at 0 and 1.

    Args:
        num_hits: from 0 to num_trials; may be fractional because of ties.
        num_trials: at least 1.
    """
    rate, z2 = num_hits / num_trials, NORMAL_QUANTILE**2
    center = rate + z2 / (2 * num_trials)
    spread = NORMAL_QUANTILE * np.sqrt(rate * (1 - rate) / num_trials + z2 / (4 * num_trials**2))
    scale = 1 + z2 / num_trials
    low, high = float((center - spread) / scale), float((center + spread) / scale)
    # The bound at a rate of 0 or 1 is exact; rounding errors would move it.
    return max(0.0, low) if num_hits > 0 else 0.0, min(1.0, high) if rate < 1 else 1.0


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    """Computes the mean of values, each repeated as often as it was drawn."""
    return float(values @ weights / weights.sum())


def weighted_median(values: np.ndarray, weights: np.ndarray) -> float:
    """Computes the median of the drawn values, rounded down to an integer rank as in papers."""
    order = np.argsort(values, kind="stable")
    ends = np.cumsum(weights[order])
    low, high = np.searchsorted(ends, [(ends[-1] - 1) // 2, ends[-1] // 2], side="right")
    return float(np.floor((values[order[low]] + values[order[high]]) / 2))


def bootstrap_interval(
    values: np.ndarray, *, clusters: np.ndarray, statistic: Statistic, bootstrap: Bootstrap
) -> tuple[float, float]:
    """Computes the percentile interval of a statistic, drawing whole clusters with replacement.

    Args:
        values: [n], one per query.
        clusters: [n] media item of each query, numbered from 0 without gaps.
        statistic: see `Statistic`.
        bootstrap: number of resamples and seed.
    """
    generator = np.random.default_rng(bootstrap.seed)
    num_clusters = int(clusters.max()) + 1
    statistics = np.empty(bootstrap.num_samples)
    for sample in range(bootstrap.num_samples):
        drawn = generator.integers(num_clusters, size=num_clusters)
        times_drawn = np.bincount(drawn, minlength=num_clusters)
        statistics[sample] = statistic(values, times_drawn[clusters])
    return percentile_interval(statistics)


def rate_interval(
    hits: np.ndarray, *, clusters: np.ndarray, bootstrap: Bootstrap
) -> tuple[float, float, str]:
    """Computes the interval of the mean of hits by a bootstrap over clusters.

    If all hits are equal (usually all 0 or all 1), so are all resamples, and the bootstrap interval
    has no width. The Wilson interval with one trial per cluster is used instead.

    Args:
        hits: [n] in [0, 1].
        clusters: [n] cluster of each hit, numbered from 0 without gaps.
        bootstrap: number of resamples and seed.

    Returns:
        (low, high, method).
    """
    if hits.min() == hits.max():
        num_clusters = int(clusters.max()) + 1
        return *wilson_interval(hits[0] * num_clusters, num_clusters), "Wilson over media items"
    interval = bootstrap_interval(
        hits, clusters=clusters, statistic=weighted_mean, bootstrap=bootstrap
    )
    return *interval, "bootstrap over media items"


def mean_score(
    values: np.ndarray,
    *,
    chance: float,
    bootstrap: Bootstrap,
    clusters: np.ndarray | None = None,
) -> Score:
    """Computes the mean of values in [0, 1], with the interval of `rate_interval`.

    Args:
        values: [n], one per query.
        chance: expected value of random embeddings.
        bootstrap: number of resamples and seed.
        clusters: [n] cluster of each query, numbered from 0 without gaps; None: each query is its
            own cluster.
    """
    if clusters is None:
        clusters = np.arange(len(values))
    low, high, method = rate_interval(values, clusters=clusters, bootstrap=bootstrap)
    return Score(float(values.mean()), low, high, chance, len(values), method)


def class_mean_interval(
    recalls: np.ndarray, *, class_sizes: np.ndarray, bootstrap: Bootstrap
) -> tuple[float, float, str]:
    """Computes the interval of the mean of class recalls, resampling the items of each class.

    Args:
        recalls: [classes present] mean hit of each class.
        class_sizes: [classes present] number of items of each class, at least 1.
        bootstrap: number of resamples and seed.

    Returns:
        (low, high, method).
    """
    num_items = int(class_sizes.sum())
    if recalls.min() == recalls.max() and recalls[0] in (0.0, 1.0):
        return *wilson_interval(recalls[0] * num_items, num_items), "Wilson"
    generator = np.random.default_rng(bootstrap.seed)
    # Drawing n items with replacement from n hits and misses is a binomial draw.
    drawn = generator.binomial(class_sizes, recalls, (bootstrap.num_samples, len(class_sizes)))
    means = (drawn / class_sizes).mean(axis=-1)
    return *percentile_interval(means), "bootstrap within classes"


def percentile_interval(statistics: np.ndarray) -> tuple[float, float]:
    """Computes the interval (low, high) of a statistic from its [resamples] bootstrap values."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(statistics, [tail, 100 - tail])
    return float(low), float(high)
