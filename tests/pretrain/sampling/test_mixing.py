"""Mixing by weight against counting one by one, exact fractions, and the stated bounds."""

import math
from fractions import Fraction

import numpy as np
import pytest

from pretrain.sampling.mixing import WEIGHT_PARTS, SourceMixture, integer_parts, spread_ranks

RARE_AND_COMMON = [(1e-4, 1), (2, 1), (1, 1), (1e-4, 1e-3, 1), (7, 3, 0, 1)]
MORE = [
    (1e-4, 1e-4, 1, 1, 1),
    (1, 2, 3, 4, 5, 6),
    (4, 4, 4, 4, 5, 6),
    (1e-4, 1e-3, 1e-2, 0.1, 1, 1),
    tuple(range(1, 131)),
]


def mixture_of(weights, *, lanes, seed=0):
    return SourceMixture(
        "image-text",
        source_names=[f"s{number}" for number in range(len(weights))],
        weights=weights,
        lanes=lanes,
        first_row=0,
        key_parts=(seed,),
    )


def bounds(weights, *, lanes):
    """Returns the stated bounds of a lane and of all lanes."""
    depth = math.ceil(math.log2(sum(weight > 0 for weight in weights)))
    return depth, 1 if depth == 1 else 1 + (depth - 1) * (1 + math.log2(lanes))


def assert_within_bounds(mixture, weights, row):
    counts = mixture.counts_by_lane(row)
    assert (counts.sum(axis=1) == row).all()
    of_lane, of_all = bounds(weights, lanes=mixture.lanes)
    for number, part in enumerate(mixture.parts):
        column = counts[:, number].tolist()
        expected = Fraction(part * row, WEIGHT_PARTS)
        assert all(abs(count - expected) < of_lane for count in {min(column), max(column)})
        assert abs(sum(column) - mixture.lanes * expected) < of_all
    return counts


@pytest.mark.parametrize("weights", RARE_AND_COMMON + MORE)
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_slots_equal_those_dealt_one_by_one(weights, lanes):
    mixture = mixture_of(weights, lanes=lanes)
    counts = np.zeros((lanes, len(weights)), dtype=np.int64)
    for row in range(150):
        assert np.array_equal(mixture.counts_by_lane(row), counts)
        rows = np.full(lanes, row)
        sources, before = mixture.draw(np.arange(lanes), rows)
        for lane, (source, count) in enumerate(zip(sources.tolist(), before.tolist(), strict=True)):
            assert count == counts[lane, source]
            assert weights[source] > 0
            counts[lane, source] += 1


@pytest.mark.parametrize("weights", RARE_AND_COMMON + MORE)
@pytest.mark.parametrize("lanes", [1, 7, 256])
def test_counts_keep_the_bounds_after_any_number_of_rows(weights, lanes):
    mixture = mixture_of(weights, lanes=lanes)
    rng = np.random.default_rng(lanes)
    for row in [*range(40), *rng.integers(0, 10**12, 10).tolist(), 2**61]:
        assert_within_bounds(mixture, weights, row)


@pytest.mark.slow
@pytest.mark.parametrize("lanes", [1, 2, 3, 8, 30, 64, 100, 256, 257, 1000, 1024, 4096])
def test_counts_keep_the_bounds_for_random_weights(lanes):
    rng = np.random.default_rng(lanes)
    for _ in range(60):
        num_sources = int(rng.integers(2, 7))
        weights = rng.choice(
            [
                10.0 ** rng.uniform(-4, 0, num_sources),
                rng.integers(1, 9, num_sources).astype(float),
                rng.uniform(0.1, 1, num_sources),
            ]
        ).tolist()
        mixture = mixture_of(weights, lanes=lanes, seed=int(rng.integers(100)))
        rows = rng.integers(0, 10 ** rng.integers(1, 13, 30))
        for row in [*range(20), *rows.tolist()]:
            assert_within_bounds(mixture, weights, row)


def test_no_lane_starves_of_a_rare_source():
    weights = (1e-4, 1)
    counts = assert_within_bounds(mixture_of(weights, lanes=256), weights, 10_002)
    assert counts[:, 0].min() == 1


def test_neighbouring_lanes_have_the_sources_in_proportion():
    mixture = mixture_of((1, 1), lanes=64)
    for row in range(8):
        sources, _ = mixture.draw(np.arange(64), np.full(64, row))
        for first in range(0, 64, 8):  # the lanes of one of eight ranks
            assert abs(sources[first : first + 8].sum() - 4) <= 1


def test_rows_until_is_the_first_row_with_enough_in_every_lane():
    for weights in RARE_AND_COMMON + MORE:
        mixture = mixture_of(weights, lanes=5)
        for source, weight in enumerate(weights):
            needed = np.array([3, 0, -2, 5, 1])
            rows = mixture.rows_until(source, needed)
            if weight == 0:
                assert rows is None
                continue
            assert (mixture.counts_by_lane(rows)[:, source] >= needed).all()
            assert (mixture.counts_by_lane(rows - 1)[:, source] < needed).any()
            assert mixture.rows_until(source, needed - 5) == 0


def test_weights_become_integers_with_a_fixed_sum():
    assert integer_parts([1, 1, 1]) == [333_333_334, 333_333_333, 333_333_333]
    assert integer_parts([0.0, 3.0]) == [0, WEIGHT_PARTS]
    assert sum(integer_parts([0.1] * 64)) == WEIGHT_PARTS


@pytest.mark.parametrize("base", [2, 3, 13])
def test_spread_ranks_are_a_permutation(base):
    assert spread_ranks(8, base=2).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]  # reversed binary digits
    for num in (1, 2, 13, 100):
        assert sorted(spread_ranks(num, base=base).tolist()) == list(range(num))
