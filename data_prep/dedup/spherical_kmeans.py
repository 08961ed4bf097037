"""k-means on the unit sphere: each centroid is the normalised sum of the vectors nearest to it.

Sizes of pieces depend on shapes alone, so that memory settings and threads change no result.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

ITERATIONS = 10
VECTORS_PER_CLUSTER = 256  # centroids are fitted to at most so many; all are assigned
COSINES_AT_ONCE = 1 << 23  # bounds the memory


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
