"""Coverage of the 95 % intervals of eval, in 1,000 experiments per row, with known truth.

python -m tests.benchmarks.coverage

Each experiment draws a model and a test set, and checks whether the interval contains the model's
true metric. The error of a coverage is 0.7 points. Metrics without an interval are listed last.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from eval.metrics.intervals import (
    Bootstrap,
    class_mean_interval,
    mean_interval,
    paired_interval,
    wilson_interval,
)
from eval.metrics.multi_label import average_precisions, difference_interval

NUM_EXPERIMENTS = 1000
CLASS_SIZES = {"1": 1, "2": 2, "3": 3, "5": 5, "30": 30, "1 to 60, unequal": None}
CAPTIONS = {"1": (1, 1), "5": (5, 5), "1 to 5": (1, 5)}
# Parameters of the beta distribution of success rates: of classes, or of media items
RATES = {"0.5, spread": (1, 1), "0.8": (8, 2), "0.05": (1, 19), "0.98": (49, 1)}
NO_INTERVAL = (
    "macro_f1, worst_group_top_k_accuracy, mean_average_precision over classes, median_rank, "
    "mean_rank, means over fewer than 20 items that are not single hits, and class means of fewer "
    "than 10 items in effect"
)

# Generator -> (low, high, truth)
Experiment = Callable[[np.random.Generator], tuple[float, float, float]]


@dataclass(frozen=True)
class Row:
    """A metric under one set of conditions."""

    metric: str
    conditions: str
    experiment: Experiment


def main() -> None:
    coverage: dict[str, list[tuple[float, str]]] = defaultdict(list)
    print("| metric | conditions | covered |\n|---|---|---|")
    for number, row in enumerate(rows()):
        generator = np.random.default_rng(number)
        results = [row.experiment(generator) for _ in range(NUM_EXPERIMENTS)]
        covered = 100 * np.mean(
            [low - 1e-12 <= truth <= high + 1e-12 for low, high, truth in results]
        )
        print(f"| {row.metric} | {row.conditions} | {covered:.1f} % |", flush=True)
        coverage[row.metric].append((float(covered), row.conditions))
    print("\n| metric | conditions | 93 to 98 % | lowest | highest |\n|---|---|---|---|---|")
    for metric, found in coverage.items():
        num_good = sum(93 <= covered <= 98 for covered, _ in found)
        low, high = (f"{covered:.1f} % ({name})" for covered, name in (min(found), max(found)))
        print(f"| {metric} | {len(found)} | {num_good} | {low} | {high} |")
    print(f"\nWithout an interval: {NO_INTERVAL}.")


def rows() -> Iterator[Row]:
    """Yields all rows of the table."""
    for size in (20, 50, 200, 1000, 5000):
        for name, (low, high) in {
            "0 to 0.1": (0, 0.1),
            "any": (0, 1),
            "0.9 to 1": (0.9, 1),
        }.items():
            yield Row(
                "accuracy, other single hits",
                f"{size} items, rate {name}",
                lambda rng, size=size, low=low, high=high: accuracy(rng, size, low, high),
            )
    for num_classes in (5, 20, 100, 400):
        for size_name, size in CLASS_SIZES.items():
            for rate_name, rates in RATES.items():
                if size is not None and num_classes * size < 10:
                    continue
                yield Row(
                    "mean_per_class_recall",
                    f"{num_classes} classes of {size_name}, recall {rate_name}",
                    lambda rng, k=num_classes, n=size, r=rates: class_recall(rng, k, n, r),
                )
    for num_items in (20, 100, 1000):
        for caption_name, captions in CAPTIONS.items():
            for rate_name, rates in RATES.items():
                conditions = f"{num_items} items with {caption_name} captions, rate {rate_name}"
                for metric, experiment in (
                    ("text_to_media_recall@k", caption_recall),
                    ("mean_recall@k", mean_recall),
                ):
                    yield Row(
                        metric,
                        conditions,
                        lambda rng, f=experiment, n=num_items, c=captions, r=rates: f(rng, n, c, r),
                    )
        for name, (mean, spread) in {"low": (2, 1.5), "middle": (1, 1), "high": (-1, 1)}.items():
            yield Row(
                "map, map@10, mrr, ndcg@10",
                f"{num_items} items, {name}",
                lambda rng, n=num_items, m=mean, s=spread: reciprocal_ranks(rng, n, m, s),
            )
        for name, chances in {"middle": (0.2, 0.5, 0.3), "high": (0.02, 0.05, 0.93)}.items():
            yield Row(
                "jaccard",
                f"{num_items} cues, {name}",
                lambda rng, n=num_items, p=chances: jaccard(rng, n, p),
            )
    for num_items in (50, 500, 5000):
        for caption_name, captions in CAPTIONS.items():
            for better, worse in ((1, 1), (3, 3), (10, 10), (3, 0), (12, 4), (40, 0)):
                if better + worse > num_items / 2:
                    continue
                kind = "equal models" if better == worse else "different models"
                yield Row(
                    "difference of hits",
                    f"{num_items} items with {caption_name} captions, {kind}, {better} better and "
                    f"{worse} worse expected",
                    lambda rng, n=num_items, c=captions, b=better, w=worse: difference(
                        rng, n, c, b, w
                    ),
                )

    for num_positives in (10, 40):
        for gain in (0.0, 0.5):
            yield Row(
                "difference of mean_average_precision",
                f"4 classes of about {num_positives} in {10 * num_positives} items, second model "
                f"{'better' if gain else 'equal'}",
                lambda rng, n=num_positives, gain=gain: precision_difference(rng, n, gain),
            )


def accuracy(
    rng: np.random.Generator, size: int, low: float, high: float
) -> tuple[float, float, float]:
    """Draws hits of independent items, as in accuracies and group scores."""
    rate = rng.uniform(low, high)
    return *wilson_interval(rng.binomial(size, rate), size), rate


def class_recall(
    rng: np.random.Generator, num_classes: int, size: int | None, rates: tuple[float, float]
) -> tuple[float, float, float]:
    """Draws recalls of classes with their own rates; unequal classes have 11 items on average."""
    sizes = np.full(num_classes, size) if size else np.minimum(rng.geometric(0.09, num_classes), 60)
    of_class = rng.beta(*rates, num_classes)
    recalls = rng.binomial(sizes, of_class) / sizes
    low, high, _ = class_mean_interval(recalls, class_sizes=sizes)
    # Unequal classes may be too few by chance.
    return (low, high, of_class.mean()) if low is not None else (0, 1, 0.5)


def clusters_of_captions(
    rng: np.random.Generator, num_items: int, captions: tuple[int, int]
) -> np.ndarray:
    return np.repeat(np.arange(num_items), rng.integers(captions[0], captions[1] + 1, num_items))


def caption_recall(
    rng: np.random.Generator, num_items: int, captions: tuple[int, int], rates: tuple[float, float]
) -> tuple[float, float, float]:
    """Draws hits of captions, whose rate is that of their item."""
    clusters = clusters_of_captions(rng, num_items, captions)
    hits = (rng.random(len(clusters)) < rng.beta(*rates, num_items)[clusters]).astype(float)
    low, high, _ = mean_interval([(hits, clusters)])
    return low, high, rates[0] / sum(rates)


def mean_recall(
    rng: np.random.Generator, num_items: int, captions: tuple[int, int], rates: tuple[float, float]
) -> tuple[float, float, float]:
    """Draws hits in both directions; an item and its captions have the same rate."""
    clusters, of_item = clusters_of_captions(rng, num_items, captions), rng.beta(*rates, num_items)
    parts = [
        ((rng.random(len(each)) < of_item[each]).astype(float), each)
        for each in (np.arange(num_items), clusters)
    ]
    low, high, _ = mean_interval(parts)
    return low, high, rates[0] / sum(rates)


def reciprocal_ranks(
    rng: np.random.Generator, num_items: int, mean: float, spread: float
) -> tuple[float, float, float]:
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
) -> tuple[float, float, float]:
    """Draws Jaccard indices of two chosen among five."""
    values = np.array([0, 1 / 3, 1])
    low, high, _ = mean_interval([(rng.choice(values, num_items, p=chances), np.arange(num_items))])
    return low, high, float(values @ chances)


def difference(
    rng: np.random.Generator, num_items: int, captions: tuple[int, int], better: int, worse: int
) -> tuple[float, float, float]:
    """Draws differences of hits; only captions of half of the items change, twice as often."""
    clusters = clusters_of_captions(rng, num_items, captions)
    draws = rng.random(len(clusters))
    changing = 2 * rng.integers(0, 2, num_items)[clusters] if captions != (1, 1) else 1
    better_rate, worse_rate = better / num_items * changing, worse / num_items * changing
    differences = (draws < better_rate).astype(float) - (
        (draws >= better_rate) & (draws < better_rate + worse_rate)
    )
    low, high = paired_interval(differences, clusters=clusters)
    return low, high, (better - worse) / num_items


def precision_difference(
    rng: np.random.Generator, num_positives: int, gain: float
) -> tuple[float, float, float]:
    """Draws two models and four classes, and compares mean average precisions."""
    first, second, of_class = class_scores(rng, 10 * num_positives, gain)
    low, high = difference_interval(
        first, second, of_class, Bootstrap(200, seed=int(rng.integers(1 << 30)))
    )
    return (low, high, true_gain(gain)) if low is not None else (0, 1, 0.5)


def class_scores(
    rng: np.random.Generator, num_items: int, gain: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws scores of two models, [4, num_items] each, and bool [4, num_items]."""
    of_class = rng.random((4, num_items)) < 0.1
    of_class[:, 0] = True  # a class without items would not be measured
    shared = rng.normal(0, 0.7, of_class.shape)
    first, second = (
        (shared + rng.normal(0, 0.7, of_class.shape) + shift * of_class).astype(np.float32)
        for shift in (1, 1 + gain)
    )
    return first, second, of_class


@cache
def true_gain(gain: float) -> float:
    """Computes the difference of mean average precisions of many items."""
    if not gain:
        return 0.0
    first, second, of_class = class_scores(np.random.default_rng(0), 100_000, gain)
    return float(
        (average_precisions(second, of_class) - average_precisions(first, of_class)).mean()
    )


if __name__ == "__main__":
    main()
