import numpy as np
import pytest

from data_prep.dedup.semantic import (
    ROWS_AT_ONCE,
    assign_clusters,
    fit_centroids,
    semantic_pairs,
)


def normalised(vectors):
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def clouds(num_clouds, *, num_each, spread, dim=16, seed=0):
    """Draws [num_clouds * num_each, dim]; rows n, n + num_clouds, ... belong to one cloud."""
    rng = np.random.default_rng(seed)
    centers = normalised(rng.normal(size=(num_clouds, dim)))
    noise = rng.normal(size=(num_each, num_clouds, dim)) * spread / np.sqrt(dim)
    return normalised(centers + noise).reshape(-1, dim)


def search(embeddings, **options):
    defaults = {"min_cosine": 0.95, "samples_per_cluster": 1000, "seed": 0}
    options = {**defaults, "num_queries": len(embeddings), **options}
    return semantic_pairs(embeddings, **options)


def groups_of(pairs, num):
    label = list(range(num))
    for first, second in zip(pairs.first.tolist(), pairs.second.tolist(), strict=True):
        old, new = label[second], label[first]
        label = [new if number == old else number for number in label]
    groups = [[n for n in range(num) if label[n] == value] for value in sorted(set(label))]
    return {tuple(group) for group in groups if len(group) > 1}


def test_clusters_are_the_clouds_that_are_there():
    embeddings = clouds(8, num_each=50, spread=0.3)
    centroids = fit_centroids(embeddings, num_clusters=24, seed=0)
    cluster, cosine = assign_clusters(embeddings, centroids)
    assert np.allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    for number in set(cluster.tolist()):
        assert len({n % 8 for n in np.flatnonzero(cluster == number)}) == 1
    assert np.allclose(cosine, (embeddings @ centroids.T).max(axis=1))


def test_a_centroid_is_the_mean_direction_of_its_members():
    embeddings = clouds(1, num_each=200, spread=1.0)
    centroids = fit_centroids(embeddings, num_clusters=1, seed=0)
    assert np.allclose(centroids[0], normalised(embeddings.sum(axis=0)), atol=1e-6)


def test_groups_are_those_of_the_double_loop():
    embeddings = clouds(400, num_each=3, spread=0.25)
    pairs, _ = search(embeddings, samples_per_cluster=10_000)
    cosines = embeddings @ embeddings.T
    label = list(range(len(embeddings)))
    assert len(embeddings) > 2 * ROWS_AT_ONCE
    for first, second in zip(*np.nonzero(np.triu(cosines >= 0.95, 1)), strict=True):
        old, new = label[second], label[first]
        label = [new if number == old else number for number in label]
    members = {}
    for number, value in enumerate(label):
        members.setdefault(value, []).append(number)
    expected = {tuple(group) for group in members.values() if len(group) > 1}
    assert len(expected) > 50
    assert groups_of(pairs, len(embeddings)) == expected


def test_of_a_group_the_least_like_the_centroid_is_kept():
    embeddings = clouds(40, num_each=4, spread=0.1)
    pairs, rank = search(embeddings, samples_per_cluster=40)
    groups = groups_of(pairs, len(embeddings))
    kept = set(pairs.first.tolist())
    assert len(kept) == len(groups) > 20
    for group in groups:
        (center,) = kept & set(group)
        assert rank[center] == min(rank[n] for n in group)


def test_similarity_is_the_cosine_to_the_kept_one():
    embeddings = clouds(40, num_each=4, spread=0.1)
    pairs, _ = search(embeddings)
    expected = (embeddings[pairs.first] * embeddings[pairs.second]).sum(axis=1)
    assert np.allclose(pairs.similarity, expected, atol=1e-6)


def test_evaluation_samples_are_what_others_are_paired_with():
    embeddings = clouds(30, num_each=4, spread=0.05)
    pairs, _ = search(embeddings, num_queries=90, samples_per_cluster=30)
    assert (pairs.first >= 90).all()
    assert set(pairs.second.tolist()) == set(range(90))
    none, _ = search(np.repeat(embeddings[:1], 5, axis=0), num_queries=0)
    assert len(none.first) == 0


def test_many_equal_embeddings_give_few_pairs():
    embeddings = np.repeat(clouds(2, num_each=1, spread=0.1), 2000, axis=0)
    pairs, _ = search(embeddings)
    assert len(pairs.first) == 4000 - 2


def test_the_seed_alone_decides():
    embeddings = clouds(100, num_each=5, spread=0.4)
    first, rank = search(embeddings, samples_per_cluster=20)
    again, rank_again = search(embeddings, samples_per_cluster=20)
    _, other_rank = search(embeddings, samples_per_cluster=20, seed=1)
    assert np.array_equal(rank, rank_again) and np.array_equal(first.second, again.second)
    assert not np.array_equal(rank, other_rank)


@pytest.mark.parametrize("num", [0, 1, 2])
def test_few_samples_are_no_trouble(num):
    pairs, rank = search(clouds(2, num_each=1, spread=0.1)[:num])
    assert len(pairs.first) == 0 and len(rank) == num
