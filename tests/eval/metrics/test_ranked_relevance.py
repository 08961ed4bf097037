"""Metrics over all relevant candidates, compared with sorting and averaging over all orders."""

import itertools

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch.nn.functional import normalize

from eval.metrics.ranked_relevance import ranked_relevance, relevance_at_chance
from eval.metrics.relevance import relevance_of_equal_captions, relevance_of_owners
from eval.metrics.retrieval import retrieval_relevance


def dense_relevance(scores, is_right):
    """Computes RankedRelevance from whole matrices [queries, candidates]."""
    query, candidate = np.nonzero(is_right)
    wrong = np.where(is_right, -np.inf, scores)[query]
    own = scores[query, candidate]
    return ranked_relevance(
        query,
        own,
        num_irrelevant_above=(wrong > own[:, None]).sum(axis=1),
        num_irrelevant_tied=(wrong == own[:, None]).sum(axis=1),
        gallery_size=scores.shape[1],
    )


def of_order(right, k):
    """Computes true recall@k, AP, AP@k, reciprocal rank and nDCG@k of one ranking by definition."""
    ranks = np.flatnonzero(right) + 1
    found = np.arange(1, len(ranks) + 1)
    within = ranks <= k
    gains = 1 / np.log2(np.arange(2, k + 2))
    return (
        within.mean(),
        (found / ranks).mean(),
        (found / ranks)[within].sum() / len(ranks),
        1 / ranks[0],
        (1 / np.log2(ranks[within] + 1)).sum() / gains[: len(ranks)].sum(),
    )


def metrics_at(ranked, k):
    return np.stack(
        [
            ranked.true_recall_at(k),
            ranked.average_precision(),
            ranked.average_precision(k),
            ranked.reciprocal_rank(),
            ranked.ndcg_at(k),
        ],
        axis=1,
    )


@pytest.mark.parametrize("k", [1, 3, 5, 10])
def test_without_ties_they_are_those_of_the_sorted_ranking(k):
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((60, 40))
    is_right = rng.random((60, 40)) < 0.15
    is_right[:, 0] |= ~is_right.any(axis=1)
    expected = [of_order(is_right[q][np.argsort(-scores[q])], k) for q in range(60)]
    np.testing.assert_allclose(
        metrics_at(dense_relevance(scores, is_right), k), expected, rtol=1e-12
    )


@pytest.mark.parametrize("k", [1, 2, 4, 6])
def test_ties_count_as_the_mean_over_all_their_orders(k):
    rng = np.random.default_rng(k)
    scores = rng.integers(0, 3, size=(12, 6)).astype(float)
    is_right = rng.random((12, 6)) < 0.5
    is_right[:, 0] |= ~is_right.any(axis=1)
    expected = []
    for row, right in zip(scores, is_right, strict=True):
        orders = [
            order
            for order in itertools.permutations(range(6))
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order))
        ]
        expected.append(np.mean([of_order(right[list(order)], k) for order in orders], axis=0))
    np.testing.assert_allclose(
        metrics_at(dense_relevance(scores, is_right), k), expected, rtol=1e-12
    )


def test_they_equal_scikit_learns():
    rng = np.random.default_rng(5)
    scores = rng.random((30, 50))
    is_right = rng.random((30, 50)) < 0.2
    is_right[:, 7] = True
    ranked = dense_relevance(scores, is_right)
    precisions = [average_precision_score(is_right[q], scores[q]) for q in range(30)]
    np.testing.assert_allclose(ranked.average_precision(), precisions, rtol=1e-9)
    for k in (1, 10, 50, 80):
        expected = ndcg_score(is_right, scores, k=k)
        assert ranked.ndcg_at(k).mean() == pytest.approx(expected, rel=1e-9)


def test_a_level_of_ten_thousand_is_what_its_formula_says():
    """Tests one relevant candidate among n tied ones: every rank is equally likely."""
    ranked = relevance_at_chance([1], gallery_size=10_000)
    harmonic = (1 / np.arange(1, 10_001)).sum() / 10_000
    assert ranked.average_precision()[0] == pytest.approx(harmonic, rel=1e-12)
    assert ranked.reciprocal_rank()[0] == pytest.approx(harmonic, rel=1e-12)
    assert ranked.true_recall_at(25)[0] == pytest.approx(25 / 10_000, rel=1e-12)


@pytest.mark.parametrize("tile", [3, 16, 4096])
def test_tiles_of_any_size_and_equal_captions_give_the_dense_relevance(tile):
    """Tests that a caption of several items is relevant to all of them."""
    generator = torch.Generator().manual_seed(3)
    owners = np.repeat(np.arange(20), 3)
    captions = [f"caption {number % 17}" for number in range(60)]
    media = normalize(torch.randn(20, 6, generator=generator), dim=-1)
    texts = normalize(torch.randn(17, 6, generator=generator), dim=-1)[torch.arange(60) % 17]
    others = normalize(torch.randn(9, 6, generator=generator), dim=-1)
    relevance = relevance_of_equal_captions(owners, captions)
    is_right = np.array(
        [
            [any(captions[own] == captions[m] for own in range(60) if owners[own] == item)]
            for item in range(20)
            for m in range(60)
        ]
    ).reshape(20, 60)
    scores = (media.double() @ texts.double().T).float().numpy()
    with_others = (media.double() @ torch.cat([texts, others]).double().T).float().numpy()
    found = retrieval_relevance(
        media, texts, relevance=relevance, distractor_embeddings=others, tile=tile
    )
    nothing = np.zeros((20, 9), dtype=bool)
    expected = (
        dense_relevance(with_others, np.concatenate([is_right, nothing], axis=1)),
        dense_relevance(scores.T, is_right.T),
    )
    for ours, truth in zip(found, expected, strict=True):
        np.testing.assert_allclose(metrics_at(ours, 5), metrics_at(truth, 5), rtol=1e-12)
        np.testing.assert_array_equal(
            ours.query_ranks().first_ranks(), truth.query_ranks().first_ranks()
        )


def test_captions_of_their_own_are_pairs_of_equal_ones_where_none_repeats():
    owners = np.array([2, 0, 1, 2])
    own, equal = (
        relevance_of_owners(owners),
        relevance_of_equal_captions(owners, ["a", "b", "c", "d"]),
    )
    assert own.media.tolist() == equal.media.tolist()
    assert own.texts.tolist() == equal.texts.tolist()
    assert own.texts_of(2).tolist() == [0, 3]
    assert relevance_of_equal_captions(owners, ["a", "b", "a", "d"]).media_of(0).tolist() == [1, 2]
