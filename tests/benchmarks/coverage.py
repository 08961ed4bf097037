"""Coverage of the 95 % intervals of eval, in 1,000 experiments per row, with known truth.

python -m tests.benchmarks.coverage [PART OF A METRIC'S NAME]

Each experiment draws a model and a test set (see coverage_experiments.py), and checks whether the
interval contains the model's true metric. The error of a coverage is 0.7 points. Where counts
forbid an interval in some experiments, more are drawn, until 1,000 have one. A row outside 93 to
98 % is measured again in 10,000 other experiments (error 0.2 points), which then count alone.
"""

from __future__ import annotations

import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from tests.benchmarks.coverage_experiments import (
    Measured,
    accuracy,
    average,
    class_recall,
    draw_difference,
    hit_difference,
    jaccard,
    precision_difference,
    recall,
    reciprocal_ranks,
)

NUM_INTERVALS = 1000
NUM_AGAIN = 10_000  # of a row that was outside
LOWEST, HIGHEST = 93, 98  # coverage in percent that counts as 95
MAX_EXPERIMENTS_EACH = 20  # a row with fewer intervals counts as without
CLASS_SIZES = {"1": 1, "2": 2, "3": 3, "5": 5, "30": 30, "1 to 60, unequal": None}
CAPTIONS = {"1 caption": (1, 1), "5 captions": (5, 5), "1 to 5 captions": (1, 5)}
RANGES = {"0 to 0.1": (0, 0.1), "any": (0, 1), "0.9 to 1": (0.9, 1)}
LIKENESS = {"unlike": 2, "alike": 20}  # media items or cues
EXACT_RATES = (0.002, 0.01, 0.02, 0.05, 0.95, 0.98, 0.99, 0.998)
# Parameters of the beta distribution of the recalls of classes
CLASS_RECALLS = {
    "0.5, spread": (1, 1),
    "0.5, extreme": (0.2, 0.2),
    "0.8": (8, 2),
    "0.05": (1, 19),
    "0.98": (49, 1),
}
CHANGES = ((1, 1), (3, 3), (10, 10), (3, 0), (5, 1), (8, 0), (12, 4), (40, 0))  # better, worse
NO_INTERVAL = (
    "macro_f1, worst_group_top_k_accuracy, mean_average_precision over classes, median_rank, "
    "mean_rank"
)


@dataclass(frozen=True)
class Row:
    """A metric under one set of conditions."""

    metric: str
    conditions: str
    experiment: Callable[[np.random.Generator], Measured]


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    found: dict[str, list[tuple[float | None, str]]] = defaultdict(list)
    print("| metric | conditions | with an interval | covered |\n|---|---|---|---|")
    for row in rows():
        if part not in row.metric:
            continue
        fraction, covered = measure(row, NUM_INTERVALS)
        if covered is not None and not LOWEST <= covered <= HIGHEST:
            fraction, covered = measure(row, NUM_AGAIN)
        text = "" if covered is None else f"{covered:.1f} %"
        given = f"{100 * fraction:.3g} %"
        print(f"| {row.metric} | {row.conditions} | {given} | {text} |", flush=True)
        found[row.metric].append((covered, row.conditions))
    header = "| metric | rows | no interval | 93 to 98 % | lowest | highest |"
    print(f"\n{header}\n|---|---|---|---|---|---|")
    for metric, results in found.items():
        known = [(covered, name) for covered, name in results if covered is not None]
        num_good = sum(LOWEST <= covered <= HIGHEST for covered, _ in known)
        low, high = (f"{covered:.1f} % ({name})" for covered, name in (min(known), max(known)))
        num_none = len(results) - len(known)
        print(f"| {metric} | {len(results)} | {num_none} | {num_good} | {low} | {high} |")
    print(f"\nNever with an interval: {NO_INTERVAL}.")


def measure(row: Row, num_intervals: int) -> tuple[float, float | None]:
    """Returns the fraction of experiments with an interval, and the coverage in percent.

    The coverage is that of the experiments with an interval; None if these are fewer than one in
    MAX_EXPERIMENTS_EACH.
    """
    seed = zlib.crc32(f"{row.metric} {row.conditions}".encode())
    generator = np.random.default_rng((seed, num_intervals))
    num_given = num_covered = num_experiments = 0
    while num_given < num_intervals:
        low, high, truth = row.experiment(generator)
        num_experiments += 1
        if low is not None and high is not None:
            num_given += 1
            num_covered += low - 1e-9 <= truth <= high + 1e-9
        if num_experiments > max(num_intervals, num_given * MAX_EXPERIMENTS_EACH):
            return num_given / num_experiments, None
    return num_given / num_experiments, 100 * num_covered / num_given


def rows() -> Iterator[Row]:
    """Yields all rows of the table."""
    yield from hit_rows()
    yield from exact_rows()
    yield from class_rows()
    for num_items in (20, 30, 50, 100, 1000):
        yield from mean_rows(num_items)
    for num_items in (20, 30, 50, 500, 5000):
        yield from difference_rows(num_items)
    sizes = ((1, 10), (1, 20), (1, 40), (4, 5), (4, 10), (5, 40), (20, 10))
    for (num_classes, num_positives), gain in product(sizes, (0.0, 0.5)):
        yield Row(
            "difference of mean_average_precision",
            f"{num_classes} classes of about {num_positives} in {10 * num_positives} items, "
            f"second model {'better' if gain else 'equal'}",
            partial(
                precision_difference,
                num_classes=num_classes,
                num_positives=num_positives,
                gain=gain,
            ),
        )


def hit_rows() -> Iterator[Row]:
    for name, rates in RANGES.items():
        for size in (2, 5, 10, 20, 50, 200, 1000, 5000):
            yield Row(
                "accuracy, other single hits",
                f"{size} items, rate {name}",
                partial(accuracy, size=size, rates=rates),
            )
        for number in (2, 5, 20):
            yield Row(
                "average of evaluations",
                f"{number} evaluations, rate {name}",
                partial(average, num_evaluations=number, rates=rates),
            )


def exact_rows() -> Iterator[Row]:
    """Yields rows of hits at one exact rate, where the coverage jumps with the rate."""
    for size, rate in product((20, 50, 200, 1000), EXACT_RATES):
        yield Row(
            "hits at one exact rate",
            f"{size} items, rate {rate}",
            partial(accuracy, size=size, rates=(rate, rate)),
        )
        yield Row(
            "hits at one exact rate",
            f"{size} alike items with 5 captions, rate {rate}",
            partial(recall, num_items=size, captions=(5, 5), rates=(rate, rate), likeness=20),
        )


def class_rows() -> Iterator[Row]:
    for num_classes in (5, 20, 100, 400):
        for size_name, size in CLASS_SIZES.items():
            for rate_name, rates in CLASS_RECALLS.items():
                yield Row(
                    "mean_per_class_recall",
                    f"{num_classes} classes of {size_name}, recall {rate_name}",
                    partial(class_recall, num_classes=num_classes, size=size, rates=rates),
                )


def mean_rows(num_items: int) -> Iterator[Row]:
    for caption_name, captions in CAPTIONS.items():
        for (rate_name, rates), (name, likeness) in product(RANGES.items(), LIKENESS.items()):
            for both in (False, True):
                yield Row(
                    "mean_recall@k" if both else "text_to_media_recall@k",
                    f"{num_items} {name} items with {caption_name}, rate {rate_name}",
                    partial(
                        recall,
                        num_items=num_items,
                        captions=captions,
                        rates=rates,
                        likeness=likeness,
                        both_directions=both,
                    ),
                )
    for name, (mean, spread) in {"low": (2, 1.5), "middle": (1, 1), "high": (-1, 1)}.items():
        yield Row(
            "map, map@10, mrr, ndcg@10",
            f"{num_items} items, {name}",
            partial(reciprocal_ranks, num_items=num_items, mean=mean, spread=spread),
        )
    for name, chances in {"middle": (0.2, 0.5, 0.3), "high": (0.02, 0.05, 0.93)}.items():
        yield Row(
            "jaccard",
            f"{num_items} cues, {name}",
            partial(jaccard, num_items=num_items, chances=chances),
        )


def difference_rows(num_items: int) -> Iterator[Row]:
    for caption_name, captions in CAPTIONS.items():
        for changes in CHANGES:
            if sum(changes) > num_items / 2:
                continue
            for unit in ("items",) if captions == (1, 1) else ("items", "captions"):
                yield Row(
                    "difference of hits",
                    f"{num_items} items with {caption_name}, {changes[0]} better and {changes[1]} "
                    f"worse expected, {unit} change",
                    partial(
                        hit_difference,
                        num_items=num_items,
                        captions=captions,
                        unit=unit,
                        changes=changes,
                    ),
                )
    for gain in (0.0, 0.05, 0.5):
        yield Row(
            "difference of few-shot accuracy",
            f"{num_items} items, gain {gain / 2:.3g}",
            partial(draw_difference, num_items=num_items, gain=gain),
        )


if __name__ == "__main__":
    main()
