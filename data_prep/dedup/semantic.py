"""Duplicates by meaning: SemDeDup (Abbas et al. 2023, "SemDeDup: Data-efficient learning at
web-scale through semantic deduplication", section 3).

1. spherical k-means on the embeddings of the media         data_prep.dedup.spherical_kmeans
2. inside each cluster, samples whose cosine is above the threshold are alike; pairs that the border
   of two clusters separates are not looked for
3. of each group, the sample with the lowest cosine to the centroid is kept: the paper's rule, which
   its published code does not follow

Memory: one cluster's embeddings, the centroids, and a few numbers for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_prep.dedup.groups import Pairs, first_connected

ROWS_AT_ONCE = 512  # of a cluster compared with all its others
ITERATIONS = 10
VECTORS_PER_CLUSTER = 256  # centroids are fitted to at most so many; all are assigned
COSINES_AT_ONCE = 1 << 23  # bounds the memory


def semantic_pairs(
    embeddings: np.ndarray,
    *,
    min_cosine: float,
    samples_per_cluster: int,
    seed: int,
    num_queries: int,
) -> tuple[Pairs, np.ndarray]:
    """Pairs that connect the samples of each group with the one that is kept.

    Args:
        embeddings: float32 [n, D], L2-normalised; may be a file on disk (numpy.memmap).
        min_cosine: of samples that are alike.
        samples_per_cluster: on average.
        seed: of k-means.
        num_queries: samples from this one on are evaluation samples, which are only compared with
            those before.

    Returns:
        the pairs, and float32 [n], the cosine of each sample to its centroid: rank of who is kept.
        A pair's similarity may be below min_cosine, where others connect the two.
    """
    num_clusters = -(-len(embeddings) // samples_per_cluster)
    centroids = fit_centroids(embeddings, num_clusters=num_clusters, seed=seed)
    cluster, rank = assign_clusters(embeddings, centroids)
    order = np.argsort(cluster, kind="stable")
    ends = np.cumsum(np.bincount(cluster, minlength=num_clusters))
    first, second, similarity = [], [], []
    for members in np.split(order, ends[:-1]):
        vectors = np.asarray(embeddings[members])
        for center, others in _groups(vectors, members < num_queries, rank[members], min_cosine):
            first.append(np.full(len(others), members[center]))
            second.append(members[others])
            similarity.append(vectors[others] @ vectors[center])
    return Pairs(
        _joined(first, np.int64), _joined(second, np.int64), _joined(similarity, np.float32)
    ), rank


def _joined(pieces: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *pieces])


def _groups(
    vectors: np.ndarray, is_query: np.ndarray, rank: np.ndarray, min_cosine: float
) -> Iterator[tuple[int, np.ndarray]]:
    """(place of the one to keep, places of all others) of each group in a cluster.

    Evaluation samples come first: one of them, where there is any, is what the others match.
    """
    label = _alike(vectors, is_query, min_cosine)
    order = np.lexsort((np.arange(len(label)), rank, is_query, label))
    sizes = np.unique(label, return_counts=True)[1]
    for group in np.split(order, np.cumsum(sizes)[:-1]):
        if len(group) > 1:
            yield int(group[0]), group[1:]


def _alike(vectors: np.ndarray, is_query: np.ndarray, min_cosine: float) -> np.ndarray:
    """int64 [c]: label of each sample's group."""
    label = np.arange(len(vectors))
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        is_alike = vectors[rows] @ vectors[start:].T >= min_cosine  # [rows, c - start]
        is_alike &= is_query[rows, None] | is_query[None, start:]
        first, second = np.nonzero(is_alike)
        so_far = np.flatnonzero(label != np.arange(len(label)))
        label = first_connected(
            len(vectors),
            np.concatenate([so_far, first + start]),
            np.concatenate([label[so_far], second + start]),
        )
    return label


def fit_centroids(embeddings: np.ndarray, *, num_clusters: int, seed: int) -> np.ndarray:
    """Centroids of clusters, from `seed` alone.

    Args:
        embeddings: float32 [n, D], L2-normalised; may be a file on disk (numpy.memmap).
        num_clusters: at most n.
        seed: chooses the vectors to fit to, and the first centroids among them.

    Returns:
        float32 [num_clusters, D], L2-normalised.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    num_fitted = min(len(embeddings), VECTORS_PER_CLUSTER * num_clusters)
    fitted = np.sort(rng.choice(len(embeddings), num_fitted, replace=False))
    centroids = np.array(embeddings[fitted[rng.choice(num_fitted, num_clusters, replace=False)]])
    for _ in range(ITERATIONS):
        sums = np.zeros(centroids.shape, np.float64)
        for places in _pieces(num_fitted, num_clusters):
            vectors = embeddings[fitted[places]]
            cluster = np.argmax(vectors @ centroids.T, axis=1)
            np.add.at(sums, cluster, vectors)
        lengths = np.linalg.norm(sums, axis=1)
        is_used = lengths > 0  # a centroid that no vector is nearest to stays where it is
        centroids[is_used] = sums[is_used] / lengths[is_used, None]
    return centroids


def assign_clusters(embeddings: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each vector, int32 [n], and the cosine to it, float32 [n].

    Args:
        embeddings: float32 [n, D], L2-normalised.
        centroids: float32 [K, D], L2-normalised.
    """
    cluster = np.empty(len(embeddings), np.int32)
    cosine = np.empty(len(embeddings), np.float32)
    for places in _pieces(len(embeddings), len(centroids)):
        cosines = embeddings[places] @ centroids.T  # [piece, K]
        cluster[places] = np.argmax(cosines, axis=1)
        cosine[places] = np.take_along_axis(cosines, cluster[places, None], axis=1)[:, 0]
    return cluster, cosine


def _pieces(num: int, num_clusters: int) -> Iterator[slice]:
    size = max(1, COSINES_AT_ONCE // max(1, num_clusters))
    return (slice(start, start + size) for start in range(0, num, size))
