"""Semantic duplicates by SemDeDup (Abbas et al. 2023, section 3).

1. Equal embeddings are folded: only the first of them is compared.
2. The media embeddings are clustered by spherical k-means.
3. Samples whose cosine reaches the threshold are duplicates. Unlike in the paper, pairs across the
   borders of clusters are searched, too (data_prep.dedup.cluster_borders).
4. Each group keeps the sample with the lowest cosine to the centroid. This is the rule of the paper
   ("SemDeDup: Data-efficient learning at web-scale through semantic deduplication"); the published
   code differs.

Memory use is limited to the embeddings of two clusters, the centroids and a few numbers per sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from data_prep.dedup.cluster_borders import ClusterBorders
from data_prep.dedup.groups import Pairs, first_connected

ROWS_AT_ONCE = 512  # number of rows that are compared with the rest of a cluster at a time
ITERATIONS = 10
VECTORS_PER_CLUSTER = 256  # limits the vectors used to fit centroids; all vectors are assigned
COSINES_AT_ONCE = 1 << 23  # limits memory use


def semantic_pairs(
    embeddings: np.ndarray,
    *,
    min_cosine: float,
    samples_per_cluster: int,
    seed: int,
    num_queries: int,
    across_clusters: bool = True,
) -> tuple[Pairs, np.ndarray]:
    """Finds pairs that connect the samples of each group with the kept sample.

    Args:
        embeddings: float32 [n, D], L2-normalised; may be a numpy.memmap.
        min_cosine: minimum cosine of duplicates.
        samples_per_cluster: average number of samples in a cluster.
        seed: seed of k-means.
        num_queries: samples with indices from this number on are evaluation samples, which are
            compared only with queries.
        across_clusters: whether to search pairs of samples in different clusters, too.

    Returns:
        pairs: pairs of duplicates. The similarity of pairs that are connected through other samples
            may be below min_cosine.
        rank: float32 [n], cosine of each sample to its centroid; a group keeps the lowest.
    """
    num_clusters = -(-len(embeddings) // samples_per_cluster)
    centroids = fit_centroids(embeddings, num_clusters=num_clusters, seed=seed)
    cluster, rank = assign_clusters(embeddings, centroids)
    is_query = np.arange(len(embeddings)) < num_queries
    original = first_equals(embeddings, is_query)
    searched = np.flatnonzero(original == np.arange(len(original)))
    members = _members_of(cluster[searched], num_clusters)
    members = [searched[each] for each in members]
    label = np.arange(len(embeddings))
    for each in members:
        label[each] = each[_first_members(embeddings[each], is_query[each], min_cosine)]
    if across_clusters:
        borders = ClusterBorders(
            embeddings, centroids, cosine=rank, members=members, min_cosine=min_cosine
        )
        label = borders.join_groups(label, is_query)
    return _pairs_of_groups(label[original], embeddings, is_query, rank), rank


def _members_of(cluster: np.ndarray, num_clusters: int) -> list[np.ndarray]:
    order = np.argsort(cluster, kind="stable")
    ends = np.cumsum(np.bincount(cluster, minlength=num_clusters))
    return np.split(order, ends[:-1])


def first_equals(embeddings: np.ndarray, is_query: np.ndarray) -> np.ndarray:
    """Returns the first embedding with the same bytes, int64 [n], among queries or evaluation.

    Args:
        embeddings: float32 [n, D]; may be a numpy.memmap.
        is_query: bool [n], whether the sample is a query or an evaluation sample.
    """
    keys = np.empty((len(embeddings), 2), np.uint64)
    rows_at_once = max(1, COSINES_AT_ONCE // max(1, embeddings.shape[1]))
    for start in range(0, len(embeddings), rows_at_once):
        rows = slice(start, start + rows_at_once)
        for number, row in enumerate(np.asarray(embeddings[rows]), start=start):
            keys[number] = np.frombuffer(hashlib.blake2b(row, digest_size=16).digest(), np.uint64)
    order = np.lexsort((np.arange(len(keys)), is_query, keys[:, 1], keys[:, 0]))
    is_first = np.ones(len(order), bool)
    same = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    is_first[1:] = ~(same & (is_query[order][1:] == is_query[order][:-1]))
    first = np.empty(len(order), np.int64)
    first[order] = order[np.maximum.accumulate(np.where(is_first, np.arange(len(order)), 0))]
    return first


def _pairs_of_groups(
    label: np.ndarray, embeddings: np.ndarray, is_query: np.ndarray, rank: np.ndarray
) -> Pairs:
    """Pairs the sample to keep of each group with all others of the group.

    Evaluation samples take precedence: if a group contains one, the other samples match it. Equal
    evaluation samples alone are no group.

    Args:
        label: int64 [n], first member of each sample's group.
        embeddings: float32 [n, D].
        is_query: bool [n], whether the sample is a query or an evaluation sample.
        rank: float32 [n], a group keeps the lowest.
    """
    order = np.lexsort((np.arange(len(label)), rank, is_query, label))
    sizes = np.unique(label, return_counts=True)[1]
    first, second, similarity = [], [], []
    for group in np.split(order, np.cumsum(sizes)[:-1]):
        if len(group) > 1 and is_query[group].any():
            first.append(np.full(len(group) - 1, group[0]))
            second.append(group[1:])
            similarity.append(embeddings[group[1:]] @ embeddings[group[0]])
    return Pairs(
        _joined(first, np.int64), _joined(second, np.int64), _joined(similarity, np.float32)
    )


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays])


def _first_members(vectors: np.ndarray, is_query: np.ndarray, min_cosine: float) -> np.ndarray:
    """Returns the first member of each sample's group, int64 [c]."""
    label = np.arange(len(vectors))
    for start in range(0, len(vectors), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        is_similar = vectors[rows] @ vectors[start:].T >= min_cosine  # [rows, c - start]
        is_similar &= is_query[rows, None] | is_query[None, start:]
        is_similar &= label[rows, None] != label[None, start:]  # joined before
        first, second = np.nonzero(is_similar)
        joined = np.flatnonzero(label != np.arange(len(label)))  # edges to earlier first members
        label = first_connected(
            len(vectors),
            np.concatenate([joined, first + start]),
            np.concatenate([label[joined], second + start]),
        )
    return label


def fit_centroids(embeddings: np.ndarray, *, num_clusters: int, seed: int) -> np.ndarray:
    """Fits the centroids of clusters; the result is a function of the arguments.

    Args:
        embeddings: float32 [n, D], L2-normalised; may be a numpy.memmap.
        num_clusters: number of clusters, at most n.
        seed: seed for the choice of vectors to fit and of initial centroids.

    Returns:
        float32 [num_clusters, D], L2-normalised.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    num_fitted = min(len(embeddings), VECTORS_PER_CLUSTER * num_clusters)
    fitted = np.sort(rng.choice(len(embeddings), num_fitted, replace=False))
    centroids = np.array(embeddings[fitted[rng.choice(num_fitted, num_clusters, replace=False)]])
    for _ in range(ITERATIONS):
        sums = np.zeros(centroids.shape, np.float64)
        for part in _parts(num_fitted, num_clusters):
            vectors = embeddings[fitted[part]]
            cluster = np.argmax(vectors @ centroids.T, axis=1)
            np.add.at(sums, cluster, vectors)
        lengths = np.linalg.norm(sums, axis=1)
        is_used = lengths > 0  # centroids of empty clusters do not change
        centroids[is_used] = sums[is_used] / lengths[is_used, None]
    return centroids


def assign_clusters(embeddings: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the nearest centroid of each vector, int32 [n], and the cosine, float32 [n].

    Args:
        embeddings: float32 [n, D], L2-normalised.
        centroids: float32 [K, D], L2-normalised.
    """
    cluster = np.empty(len(embeddings), np.int32)
    cosine = np.empty(len(embeddings), np.float32)
    for part in _parts(len(embeddings), len(centroids)):
        cosines = embeddings[part] @ centroids.T  # [part, K]
        cluster[part] = np.argmax(cosines, axis=1)
        cosine[part] = np.take_along_axis(cosines, cluster[part, None], axis=1)[:, 0]
    return cluster, cosine


def _parts(num: int, num_clusters: int) -> Iterator[slice]:
    size = max(1, COSINES_AT_ONCE // max(1, num_clusters))
    return (slice(start, start + size) for start in range(0, num, size))
