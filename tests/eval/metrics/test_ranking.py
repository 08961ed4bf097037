import numpy as np
import pytest
import torch
from scipy.stats import hypergeom

from eval.metrics.ranking import QueryRanks, chance_ranks, cosine_scores, median_rank_at_chance


def test_hit_probability_equals_random_tie_breaking():
    num_above, num_tied, num_relevant = 2, 4, 2
    generator = np.random.default_rng(0)
    ranks = QueryRanks(
        np.array([num_above]), np.array([num_tied]), np.array([num_relevant]), gallery_size=20
    )
    tied = np.array([1] * num_relevant + [0] * num_tied)
    shuffled = generator.permuted(np.tile(tied, (40_000, 1)), axis=1)
    first = num_above + shuffled.argmax(axis=1)
    for k in range(1, 10):
        assert ranks.hits_at(k)[0] == pytest.approx((first < k).mean(), abs=0.01)
    assert ranks.first_ranks()[0] == pytest.approx(first.mean() + 1, abs=0.03)


@pytest.mark.parametrize("num_relevant", [1, 3, 5])
def test_chance_equals_the_hypergeometric_distribution(num_relevant):
    ranks = chance_ranks([num_relevant], gallery_size=40)
    for k in (1, 5, 10, 39, 40):
        expected = 1 - hypergeom(40, num_relevant, k).pmf(0)
        assert ranks.hits_at(k)[0] == pytest.approx(expected, abs=1e-12)
    assert ranks.hits_at(1000)[0] == 1


@pytest.mark.parametrize(("gallery_size", "expected"), [(1, 1), (10, 5), (11, 6)])
def test_median_rank_at_chance_is_the_middle_of_the_gallery(gallery_size, expected):
    assert median_rank_at_chance(chance_ranks([1, 1], gallery_size=gallery_size)) == expected


def test_equal_pairs_score_equally_whatever_the_shape_of_the_tile():
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(5, 96, generator=generator), dim=-1)
    many = rows[1:2].repeat(301, 1)
    scores = cosine_scores(rows, many)
    assert scores.shape == (5, 301)
    assert scores.dtype == torch.float32
    for width in (1, 3, 17):
        assert torch.equal(cosine_scores(rows, many[:width]), scores[:, :width])
    assert (scores == scores[:, :1]).all()
