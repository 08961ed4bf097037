import numpy as np
import pytest
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

from eval.metrics.intervals import (
    Bootstrap,
    bootstrap_interval,
    class_mean_interval,
    rate_interval,
    weighted_mean,
    weighted_median,
    wilson_interval,
)


@pytest.mark.parametrize(("num_hits", "num_trials"), [(0, 7), (3, 7), (7, 7), (1, 1), (600, 1045)])
def test_wilson_interval_equals_scipy(num_hits, num_trials):
    expected = binomtest(num_hits, num_trials).proportion_ci(0.95, method="wilson")
    found = wilson_interval(num_hits, num_trials)
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_weighted_median_equals_the_median_of_the_repeated_values():
    generator = np.random.default_rng(0)
    for num_values in (1, 2, 9, 30):
        values = generator.integers(1, 20, num_values).astype(float)
        weights = generator.integers(0, 4, num_values)
        weights[0] += 1
        expected = np.floor(np.median(np.repeat(values, weights)))
        assert weighted_median(values, weights) == expected


def test_bootstrap_repeats_itself_and_follows_its_seed():
    values, clusters = np.random.default_rng(0).random(60), np.repeat(np.arange(20), 3)
    intervals = [
        bootstrap_interval(
            values,
            clusters=clusters,
            statistic=weighted_mean,
            bootstrap=Bootstrap(num_samples=200, seed=seed),
        )
        for seed in (0, 0, 1)
    ]
    assert intervals[0] == intervals[1] != intervals[2]


def test_bootstrap_of_single_queries_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=150)
    found = bootstrap_interval(
        values,
        clusters=np.arange(150),
        statistic=weighted_mean,
        bootstrap=Bootstrap(num_samples=4000),
    )
    expected = scipy_bootstrap((values,), np.mean, method="percentile", random_state=0)
    assert found == pytest.approx(tuple(expected.confidence_interval), abs=0.02)


def test_intervals_over_media_items_cover_the_truth_where_single_captions_do_not():
    generator = np.random.default_rng(0)
    num_items, captions_each, trials = 100, 5, 120
    by_item, by_caption = np.repeat(np.arange(num_items), captions_each), np.arange(500)
    covered = {"item": 0, "caption": 0}
    for _ in range(trials):
        rates = generator.beta(0.5, 0.5, num_items)  # captions of an item succeed together
        hits = (generator.random((num_items, captions_each)) < rates[:, None]).ravel().astype(float)
        for unit, clusters in (("item", by_item), ("caption", by_caption)):
            low, high, _ = rate_interval(
                hits, clusters=clusters, bootstrap=Bootstrap(num_samples=200)
            )
            covered[unit] += low <= 0.5 <= high
    assert covered["item"] / trials > 0.88
    assert covered["caption"] / trials < 0.85


def test_interval_does_not_collapse_when_every_query_hits():
    hits, clusters = np.ones(50), np.repeat(np.arange(10), 5)
    low, high, method = rate_interval(hits, clusters=clusters, bootstrap=Bootstrap(100))
    assert (low, high) == pytest.approx(wilson_interval(10, 10))
    assert method == "Wilson over media items"
    low, high, _ = class_mean_interval(
        np.ones(3), class_sizes=np.array([4, 5, 6]), bootstrap=Bootstrap(100)
    )
    assert (low, high) == pytest.approx(wilson_interval(15, 15))


def test_class_mean_interval_weighs_classes_equally():
    low, high, _ = class_mean_interval(
        np.array([0.9, 0.1]), class_sizes=np.array([1000, 10]), bootstrap=Bootstrap(2000)
    )
    # Half-width by the normal approximation: 1.96 * sqrt(.9*.1/1000 + .1*.9/10) / 2 = 0.093
    assert low < 0.5 < high
    assert (high - low) / 2 == pytest.approx(0.093, abs=0.02)
