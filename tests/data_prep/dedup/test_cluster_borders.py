"""Semantic duplicates of any clustering, against a double loop over all pairs."""

import numpy as np
import pytest

from data_prep.dedup import cluster_borders, semantic
from data_prep.dedup.semantic import first_equals, semantic_pairs
from tests.data_prep.dedup.test_semantic import clouds, groups_of, normalised, search


def groups_of_double_loop(embeddings, min_cosine, num_queries):
    num = len(embeddings)
    label = list(range(num))
    for first, second in zip(*np.nonzero(embeddings @ embeddings.T >= min_cosine), strict=True):
        if first < second and first < num_queries:
            old, new = label[second], label[first]
            label = [new if number == old else number for number in label]
    groups = [tuple(n for n in range(num) if label[n] == value) for value in sorted(set(label))]
    return {group for group in groups if len(group) > 1}


@pytest.mark.parametrize("samples_per_cluster", [2, 5, 20, 1000])
@pytest.mark.parametrize("min_cosine", [0.5, 0.8, 0.95, 0.999, 1.0])
def test_no_pair_is_missed_whatever_the_clusters(samples_per_cluster, min_cosine):
    embeddings = clouds(60, num_each=4, spread=0.5, dim=6, seed=samples_per_cluster)
    embeddings = np.concatenate([embeddings, embeddings[:20], embeddings[40:50]])
    expected = groups_of_double_loop(embeddings, min_cosine, 200)
    pairs, _ = search(
        embeddings, min_cosine=min_cosine, samples_per_cluster=samples_per_cluster, num_queries=200
    )
    if min_cosine == 1.0:  # rounding decides whether a vector reaches 1 with itself
        assert len(groups_of(pairs, len(embeddings))) >= 20
    else:
        assert groups_of(pairs, len(embeddings)) == expected


def test_all_planted_leaks_are_found_only_with_the_borders():
    """Adds copies of 40 evaluation samples, at a cosine of 0.96, to 2,000 others."""
    rng = np.random.default_rng(0)
    others = normalised(rng.normal(size=(2000, 32)))
    evaluation = normalised(rng.normal(size=(40, 32)))
    sideways = rng.normal(size=evaluation.shape)
    sideways -= (sideways * evaluation).sum(axis=1, keepdims=True) * evaluation
    leaks = normalised(0.96 * evaluation + np.sqrt(1 - 0.96**2) * normalised(sideways))
    embeddings = np.concatenate([leaks, others, evaluation])
    found = {}
    for across_clusters in (True, False):
        pairs, _ = search(
            embeddings,
            samples_per_cluster=20,
            num_queries=2040,
            across_clusters=across_clusters,
        )
        found[across_clusters] = set(pairs.second[pairs.second < 40].tolist())
    assert found[True] == set(range(40))
    assert found[False] < found[True]


def test_equal_vectors_are_compared_once():
    embeddings = clouds(5, num_each=2, spread=0.2)[[0, 1, 0, 2, 0, 1, 3, 3]]
    is_query = np.array([1, 1, 1, 1, 0, 0, 0, 0], bool)
    assert first_equals(embeddings, is_query).tolist() == [0, 1, 0, 3, 4, 5, 6, 6]


def test_equal_evaluation_samples_follow_a_query_but_are_no_group_alone():
    embeddings = clouds(3, num_each=1, spread=0.1)[[0, 1, 0, 0, 2, 2]]
    pairs, _ = semantic_pairs(
        embeddings, min_cosine=0.95, samples_per_cluster=2, seed=0, num_queries=2
    )
    assert groups_of(pairs, 6) == {(0, 2, 3)}
    assert set(pairs.first.tolist()) == {2}


def test_many_nearly_equal_vectors_give_few_edges(monkeypatch):
    """Counts the edges of 3,000 vectors that are all similar: 4,500,000 pairs."""
    rng = np.random.default_rng(0)
    embeddings = normalised(np.ones((3000, 8)) + 0.001 * rng.normal(size=(3000, 8)))
    num_edges, connected = [], semantic.first_connected

    def counted(num, first, second):
        num_edges.append(len(first))
        return connected(num, first, second)

    monkeypatch.setattr(semantic, "first_connected", counted)
    monkeypatch.setattr(cluster_borders, "first_connected", counted)
    pairs, _ = search(embeddings, samples_per_cluster=3000)
    assert len(pairs.second) == 2999
    assert sum(num_edges) < 4_500_000 / 2
