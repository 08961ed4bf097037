"""Confidence intervals: exact values, symmetry, and coverage in small experiments.

tests/benchmarks/coverage.py measures the coverage of all of them.
"""

import numpy as np
import pytest
from scipy.stats import binomtest, norm, poisson

from eval.metrics.intervals import (
    MIN_CHANGES,
    MIN_CLASS_TRIALS,
    MIN_CLUSTERS,
    MIN_TRIALS,
    class_mean_interval,
    cluster_deviations,
    hits_interval,
    mean_interval,
    mean_score,
    paired_interval,
    trials_of_interval,
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
    parts = [(hits, np.arange(9))]
    assert mean_interval(parts, are_hits=True) == (*wilson_interval(7, 9), "Wilson")
    score = mean_score(hits, chance=0.5, are_hits=True)
    assert (score.low, score.high, score.num_queries) == (*wilson_interval(7, 9), 9)


def test_few_items_have_no_interval_unless_they_are_counted():
    values = np.linspace(0, 1, MIN_CLUSTERS)
    few, enough = np.arange(MIN_CLUSTERS - 1), np.arange(MIN_CLUSTERS)
    assert mean_interval([(values[:-1], few)]) == (None, None, "none: fewer than 30 items")
    low, high, method = mean_interval([(values, enough)])
    assert (low < 0.5 < high, method) == (True, "Wilson over media items")
    # Values that are 0 or 1 by luck do not become a count.
    assert mean_interval([(np.ones(len(few)), few)])[2] == "none: fewer than 30 items"
    assert mean_interval([(np.ones(MIN_TRIALS), few[:MIN_TRIALS])], are_hits=True)[1] == 1
    for num_hits in range(MIN_TRIALS):
        assert hits_interval(num_hits, MIN_TRIALS - 1)[2] == "none: fewer than 5 items"
        assert None not in hits_interval(num_hits, MIN_TRIALS)


@pytest.mark.parametrize("recall", [0.5, 1.0])
def test_few_items_of_classes_have_no_interval(recall):
    sizes = np.full(MIN_CLASS_TRIALS // 2, 2)
    recalls = np.full(len(sizes), recall)
    assert None not in class_mean_interval(recalls, class_sizes=sizes)
    found = class_mean_interval(recalls[1:], class_sizes=sizes[1:])
    assert found == (None, None, "none: fewer than 30 items in effect")
    sizes, recalls = np.array([1, 20] * 50), np.full(100, recall)
    assert None not in class_mean_interval(recalls, class_sizes=sizes)
    sizes[1] = 1
    found = class_mean_interval(recalls, class_sizes=sizes)
    assert found == (None, None, "none: most classes have one item")


def test_the_trials_of_an_interval_are_those_it_was_computed_from():
    for num_trials in (5, 31.7, 2000):
        for rate in (0, 0.01, 0.5, 0.7, 1):
            low, high = wilson_interval(rate * num_trials, num_trials)
            assert trials_of_interval(rate, low, high) == pytest.approx(num_trials)


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
    low, high, _ = class_mean_interval(np.ones(9), class_sizes=np.array([4, 5, 6] * 3))
    assert (low, high) == pytest.approx(wilson_interval(43.8, 43.8), abs=0.01)
    for value in (0.1, 1 / 3, 0.2):  # equal values, whose mean may be rounded
        low, high, _ = mean_interval([(np.full(40, value), np.arange(40))])
        assert (low, high) == pytest.approx(wilson_interval(40 * value, 40))


def test_class_mean_interval_weighs_classes_equally():
    low, high, _ = class_mean_interval(np.array([0.9, 0.1]), class_sizes=np.array([1000, 10]))
    # Half-width by the normal approximation: 1.96 * sqrt(.9*.1/1000 + .1*.9/10) / 2 = 0.093
    assert low < 0.5 < high
    assert (high - low) / 2 == pytest.approx(0.093, abs=0.03)


@pytest.mark.parametrize("size", [2, 3, 5, 30])
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


def test_paired_interval_is_the_set_of_means_that_tangos_test_accepts():
    """Tests both sides of both ends, where the likeliest number of changes is searched for."""
    num_items = 2000
    clusters = np.arange(num_items)
    for num_better, num_worse in ((6, 0), (0, 7), (6, 2), (20, 30), (100, 0)):
        low, high, method = paired_interval(
            changes(num_better, num_worse, num_items), clusters=clusters
        )
        for end, outwards in ((low, -0.01), (high, 0.01)):
            for step, expected in ((-outwards, True), (outwards, False)):
                mean = end * num_items + step
                found = is_accepted(mean, num_better, num_worse, num_items=num_items)
                assert found == expected
        assert method == "Tango over media items"


def is_accepted(mean: float, num_better: int, num_worse: int, *, num_items: int) -> bool:
    """Tests an expected number of better minus worse items, as in Tango 1998."""
    worse = max(0.0, -mean) + np.linspace(1e-9, 150, 150_001)  # Poisson means with this difference
    likelihood = num_better * np.log(worse + mean) - 2 * worse if num_better else -2 * worse
    total = 2 * worse[np.argmax(likelihood + num_worse * np.log(worse))] + mean
    tail = 0.025 * poisson.sf(MIN_CHANGES - 1, total)  # of the experiments with an interval
    z = (num_better - num_worse - mean) / np.sqrt(total - mean**2 / num_items)
    return norm.sf(abs(z)) >= tail


def test_paired_interval_is_symmetric_and_needs_six_changes():
    for num_items in (30, 1000):
        clusters = np.arange(num_items)
        for num_changed in range(MIN_CHANGES):
            found = paired_interval(changes(num_changed, 0, num_items), clusters=clusters)
            assert found == (None, None, "none: fewer than 6 items changed")
        for num_better, num_worse in ((6, 0), (8, 1), (3, 3), (20, 4), (10, 10)):
            differences = changes(num_better, num_worse, num_items)
            low, high, _ = paired_interval(differences, clusters=clusters)
            assert -1 <= low < differences.mean() < high <= 1
            # The sign test: p = 0.03, 0.04, 1, 0.002, 1
            assert (low > 0) == (num_better > 2 * num_worse)
            found = paired_interval(-differences, clusters=clusters)[:2]
            assert found == pytest.approx((-high, -low))
    found = paired_interval(changes(20, 0, 29), clusters=np.arange(29))
    assert found == (None, None, "none: fewer than 30 items")


def test_paired_interval_of_extreme_and_of_equal_differences():
    clusters = np.arange(40)
    low, high, _ = paired_interval(np.ones(40), clusters=clusters)
    assert (low, high) == pytest.approx((wilson_interval(40, 40)[0], 1), abs=0.02)
    low, high, _ = paired_interval(np.full(40, 0.2), clusters=clusters)
    assert low < 0.2 - 0.05 < 0.2 + 0.05 < high  # equal differences do not prove their mean


def test_paired_interval_covers_the_truth_where_an_interval_is_given():
    """Tests few expected changes. Only experiments with enough changes have an interval."""
    generator = np.random.default_rng(0)
    for expected in (3, 5, 8):  # one in twelve experiments or more has an interval
        found = []
        while len(found) < 100:
            differences = (generator.random(500) < expected / 500).astype(float)
            low, high, _ = paired_interval(differences, clusters=np.arange(500))
            if low is not None:
                found.append(low <= expected / 500 <= high)
        assert np.mean(found) >= 0.88


def test_captions_of_one_item_that_change_together_count_once():
    differences = changes(20, 0, 400)
    alone = paired_interval(differences, clusters=np.arange(400))
    together = paired_interval(differences, clusters=np.repeat(np.arange(40), 10))
    assert alone[0] > 0
    assert together[2] == "none: fewer than 6 items changed"  # two items
    differences = changes(60, 0, 400)
    alone = paired_interval(differences, clusters=np.arange(400))
    together = paired_interval(differences, clusters=np.repeat(np.arange(40), 10))
    assert together[1] - together[0] > 2 * (alone[1] - alone[0])
