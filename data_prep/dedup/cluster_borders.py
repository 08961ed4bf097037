"""Pairs of similar vectors in different clusters of spherical k-means, found without gaps.

A vector x of cluster i lies on its side of the plane between the centroids c_i and c_j. The
distance to that plane is (x.c_i - x.c_j) / |c_i - c_j|. Two vectors on different sides are at least
as far apart as the sum of their distances to the plane. A cosine of t is a distance of
sqrt(2 - 2 t) between normalised vectors. So only the vectors of i and j that lie this near to their
plane are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from data_prep.dedup.groups import first_connected

MAX_NORM = 1 + 1e-3  # read_embeddings accepts such norms
ROUNDING = 1e-4  # of distances to a plane, in float32
MIN_GAP = 1e-3  # centroids nearer than this are not separated by a plane
ROWS_AT_ONCE = 2048
COSINES_AT_ONCE = 1 << 24  # limits memory use


class ClusterBorders:
    """The vectors of clusters, and their distances to the planes between the clusters.

    Args:
        embeddings: float32 [n, D], L2-normalised; may be a numpy.memmap.
        centroids: float32 [K, D], L2-normalised.
        cosine: float32 [n], cosine of each vector with the centroid of its cluster.
        members: int64 [m] per cluster, the vectors to search.
        min_cosine: minimum cosine of similar vectors.
    """

    def __init__(
        self,
        embeddings: np.ndarray,
        centroids: np.ndarray,
        *,
        cosine: np.ndarray,
        members: list[np.ndarray],
        min_cosine: float,
    ) -> None:
        self.embeddings = embeddings
        self.centroids = centroids
        self.cosine = cosine
        self.members = members
        self.min_cosine = min_cosine
        self.max_distance = float(np.sqrt(max(2 * MAX_NORM**2 - 2 * min_cosine, 0))) + ROUNDING

    def join_groups(self, label: np.ndarray, is_query: np.ndarray) -> np.ndarray:
        """Joins groups that hold a pair of similar vectors in different clusters.

        Args:
            label: int64 [n], first member of the group of each vector.
            is_query: bool [n]; two vectors that are not queries form no pair.

        Returns:
            The first members of the joined groups, int64 [n].
        """
        parent = label.copy()  # a forest: the roots are their own parents
        for cluster, members in enumerate(self.members):
            if not len(members):
                continue
            vectors = np.asarray(self.embeddings[members])
            for other, rows in self._near_rows(cluster, vectors):
                self._join_pair(parent, is_query, members[rows], vectors[rows], cluster, other)
        return _roots(parent, np.arange(len(parent)))

    def _near_rows(self, cluster: int, vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (later cluster, rows of this cluster near the plane between the two)."""
        centroid = self.centroids[cluster]
        later = np.arange(cluster + 1, len(self.centroids))
        step = max(1, COSINES_AT_ONCE // max(1, len(vectors)))
        own = vectors @ centroid
        for start in range(0, len(later), step):
            others = later[start : start + step]
            gap = np.linalg.norm(self.centroids[others] - centroid, axis=1)
            difference = own[:, None] - vectors @ self.centroids[others].T  # [m, others]
            is_near = difference <= self._max_difference(gap)
            for column in np.flatnonzero(is_near.any(axis=0)):
                yield int(others[column]), np.flatnonzero(is_near[:, column])

    def _max_difference(self, gap: np.ndarray) -> np.ndarray:
        """Returns the maximum of x.c_i - x.c_j for vectors near the plane, [K]."""
        return np.where(gap < MIN_GAP, np.inf, self.max_distance * gap)

    def _join_pair(
        self,
        parent: np.ndarray,
        is_query: np.ndarray,
        samples: np.ndarray,
        vectors: np.ndarray,
        cluster: int,
        other: int,
    ) -> None:
        """Joins the groups of similar vectors of two clusters in the forest `parent`."""
        members = self.members[other]
        other_vectors = np.asarray(self.embeddings[members])
        gap = np.linalg.norm(self.centroids[other] - self.centroids[cluster])
        difference = self.cosine[members] - other_vectors @ self.centroids[cluster]
        near = np.flatnonzero(difference <= self._max_difference(gap))
        members, other_vectors = members[near], other_vectors[near]
        for start in range(0, len(samples), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            is_similar = vectors[rows] @ other_vectors.T >= self.min_cosine
            is_similar &= is_query[samples[rows], None] | is_query[None, members]
            if is_similar.any():
                left, right = _roots(parent, samples[rows]), _roots(parent, members)
                is_similar &= left[:, None] != right[None, :]
                first, second = np.nonzero(is_similar)
                _join(parent, left[first], right[second])


def _roots(parent: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    roots = parent[numbers]
    while (parent[roots] != roots).any():
        roots = parent[roots]
    return roots


def _join(parent: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Joins pairs of roots; the first of all joined roots becomes their parent."""
    roots, index = np.unique(np.concatenate([left, right]), return_inverse=True)
    parent[roots] = roots[first_connected(len(roots), *index.reshape(2, -1))]
