"""Confidence intervals: exact values, symmetry, and coverage in small experiments.

tests/benchmarks/coverage.py measures the coverage of all of them.
"""

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.metrics.intervals import (
    MIN_CLASS_TRIALS,
    MIN_CLUSTERS,
    class_mean_interval,
    cluster_deviations,
    mean_interval,
    mean_score,
    paired_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("num_hits", "num_trials"), [(0, 7), (3, 7), (7, 7), (1, 1), (600, 1045)])
def test_wilson_interval_equals_scipy(num_hits, num_trials):
    expected = binomtest(num_hits, num_trials).proportion_ci(0.95, method="wilson")
    found = wilson_interval(num_hits, num_trials)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_interval_ends_exactly_at_0_and_1():
    for num_trials in range(1, 400):
        assert wilson_interval(0, num_trials)[0] == 0.0
        assert wilson_interval(num_trials, num_trials)[1] == 1.0
        rate = 0.1 + 0.2 + 0.7  # 1 after rounding, or nearly so
        assert 0 <= wilson_interval(rate * num_trials, num_trials)[1] <= 1


def test_hits_of_single_queries_have_wilsons_interval():
    hits = np.array([1.0] * 7 + [0.0] * 2)
    assert mean_interval([(hits, np.arange(9))]) == (*wilson_interval(7, 9), "Wilson")
    score = mean_score(hits, chance=0.5)
    assert (score.low, score.high, score.num_queries) == (*wilson_interval(7, 9), 9)


def test_few_items_have_no_interval_unless_they_are_counted():
    values = np.linspace(0, 1, MIN_CLUSTERS)
    few, enough = np.arange(MIN_CLUSTERS - 1), np.arange(MIN_CLUSTERS)
    assert mean_interval([(values[:-1], few)]) == (None, None, "none")
    low, high, method = mean_interval([(values, enough)])
    assert (low < 0.5 < high, method) == (True, "Wilson over media items")
    for recall in (0.5, 1.0):
        sizes = np.full(MIN_CLASS_TRIALS - 1, 1)
        recalls = np.full(len(sizes), recall)
        assert class_mean_interval(recalls, class_sizes=sizes) == (None, None, "none")
        assert None not in class_mean_interval(recalls, class_sizes=sizes + 1)


def test_mean_interval_is_that_of_the_normal_approximation_for_many_items():
    generator = np.random.default_rng(0)
    num_items = 4000
    sizes = generator.integers(1, 6, num_items)
    clusters = np.repeat(np.arange(num_items), sizes)
    values = generator.beta(2, 3, num_items)[clusters] * generator.random(len(clusters))
    low, high, _ = mean_interval([(values, clusters)])
    sums, mean = np.bincount(clusters, weights=values), values.mean()
    error = np.sqrt(np.square(sums - mean * sizes).sum()) / len(values)  # of a ratio of sums
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=2e-4)
    assert np.square(cluster_deviations(values, clusters)).mean() / num_items == pytest.approx(
        error**2
    )


def test_both_directions_of_the_same_items_are_one_sample():
    """Tests that equal values in both directions give the interval of one direction."""
    values, clusters = np.random.default_rng(0).random(50), np.arange(50)
    one, both = mean_interval([(values, clusters)]), mean_interval([(values, clusters)] * 2)
    assert both == pytest.approx(one)
    low, high, _ = mean_interval([(values, clusters), (1 - values, clusters)])
    assert high - low < 0.4 * (one[1] - one[0])  # the sum of both is constant


def test_intervals_over_media_items_cover_the_truth_where_single_captions_do_not():
    generator = np.random.default_rng(0)
    num_items, captions_each, trials = 100, 5, 400
    by_item, by_caption = np.repeat(np.arange(num_items), captions_each), np.arange(500)
    covered = {"item": 0, "caption": 0}
    for _ in range(trials):
        rates = generator.beta(0.5, 0.5, num_items)  # captions of an item succeed together
        hits = (generator.random((num_items, captions_each)) < rates[:, None]).ravel().astype(float)
        for unit, clusters in (("item", by_item), ("caption", by_caption)):
            low, high, _ = mean_interval([(hits, clusters)])
            covered[unit] += low <= 0.5 <= high
    assert 0.92 < covered["item"] / trials < 0.985
    assert covered["caption"] / trials < 0.85


def test_interval_does_not_collapse_when_every_query_hits():
    hits, clusters = np.ones(150), np.repeat(np.arange(30), 5)
    low, high, _ = mean_interval([(hits, clusters)])
    assert (low, high) == pytest.approx((wilson_interval(30, 30)[0], 1.0), abs=0.02)
    low, high, _ = class_mean_interval(np.ones(3), class_sizes=np.array([4, 5, 6]))
    assert (low, high) == pytest.approx(wilson_interval(14.6, 14.6), abs=0.01)


def test_class_mean_interval_weighs_classes_equally():
    low, high, _ = class_mean_interval(np.array([0.9, 0.1]), class_sizes=np.array([1000, 10]))
    # Half-width by the normal approximation: 1.96 * sqrt(.9*.1/1000 + .1*.9/10) / 2 = 0.093
    assert low < 0.5 < high
    assert (high - low) / 2 == pytest.approx(0.093, abs=0.03)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 30])
def test_class_mean_interval_covers_the_truth_for_any_number_of_items_per_class(size):
    generator = np.random.default_rng(size)
    num_covered = 0
    for _ in range(400):
        rates = generator.beta(8, 2, 50)
        recalls = generator.binomial(size, rates) / size
        low, high, _ = class_mean_interval(recalls, class_sizes=np.full(50, size))
        num_covered += low <= rates.mean() <= high
    assert 0.92 < num_covered / 400 < 0.99


def changes(num_better, num_worse, num_items):
    differences = np.zeros(num_items)
    differences[:num_better], differences[num_better : num_better + num_worse] = 1, -1
    return differences


def test_paired_interval_is_the_set_of_means_that_the_score_test_accepts():
    """Compares with a search over all means on a grid."""
    for num_better, num_worse in ((0, 0), (1, 0), (5, 0), (0, 7), (6, 2), (20, 30), (100, 0)):
        differences = changes(num_better, num_worse, 100)
        mean, square = differences.mean(), np.square(differences).mean()
        grid = np.linspace(-1, 1, 200_001)
        variance = np.maximum(square, np.abs(grid)) - grid**2
        accepted = grid[np.square(mean - grid) <= 1.959964**2 * variance / 100 + 1e-12]
        found = paired_interval(differences, clusters=np.arange(100))
        assert found == pytest.approx((accepted[0], accepted[-1]), abs=2e-5)


def test_paired_interval_is_symmetric_and_calls_few_changes_unclear():
    for num_items in (30, 1000):
        clusters = np.arange(num_items)
        low, high = paired_interval(np.zeros(num_items), clusters=clusters)
        assert -high == low < 0 < high
        for num_changed in range(1, 4):  # all in one direction: p = 0.25 or more
            differences = changes(num_changed, 0, num_items)
            low, high = paired_interval(differences, clusters=clusters)
            assert low < 0 < num_changed / num_items < high
            assert paired_interval(-differences, clusters=clusters) == pytest.approx((-high, -low))
        low, _ = paired_interval(changes(8, 0, num_items), clusters=clusters)
        assert low > 0


def test_captions_of_one_item_that_change_together_count_once():
    differences = changes(20, 0, 200)
    alone = paired_interval(differences, clusters=np.arange(200))
    together = paired_interval(differences, clusters=np.repeat(np.arange(20), 10))
    assert alone[0] > 0 > together[0]
