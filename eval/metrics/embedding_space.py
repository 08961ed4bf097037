"""Geometry of two kinds of embeddings in the joint space.

Metrics are the modality gap between the two kinds, the alignment of matching pairs, the uniformity
of each kind, and hubness: whether a few items are nearest to many queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.ranking import cosine_scores
from eval.metrics.relevance import Relevance

MAX_QUERIES = 4096  # queries used for the hubness
MAX_UNIFORMITY_ITEMS = 2048  # items whose pairwise distances are used for the uniformity
NEIGHBOURS = 10  # k of the k-occurrences
QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Hubness:
    """k-occurrences of the items of a gallery (Radovanovic et al. 2010).

    The k-occurrence of an item is the number of queries that have it among their k nearest items.
    Without hubs, all items occur about equally often and the skewness is near 0.
    """

    occurrences: np.ndarray  # int64 [gallery] k-occurrence of each item, k = NEIGHBOURS
    num_queries: int
    skewness: float  # third standardised moment of the occurrences

    @property
    def fraction_never_found(self) -> float:
        """Fraction of the gallery that is among the nearest of no query."""
        return float((self.occurrences == 0).mean())

    @property
    def most_found(self) -> float:
        """Fraction of the queries that have the most frequent item among their nearest."""
        return float(self.occurrences.max() / self.num_queries)


@dataclass(frozen=True)
class EmbeddingSpace:
    """Geometry of the media embeddings and the text (or other media) embeddings of a retrieval."""

    modality_gap: float  # distance between the two means (Liang et al. 2022)
    alignment: float  # mean squared distance of matching pairs (Wang and Isola 2020)
    uniformity: tuple[float, float]  # log mean exp(-2 * squared distance), for each kind
    hubness: tuple[Hubness, Hubness]  # with the second kind as the gallery, then with the first

    def record(self) -> dict[str, float]:
        """Returns the metrics by name, for results.json."""
        record = {"modality_gap": self.modality_gap, "alignment": self.alignment}
        for index, side in enumerate(("media", "other")):
            record[f"{side}_uniformity"] = self.uniformity[index]
            hubness = self.hubness[1 - index]  # with this side as the gallery
            record[f"{side}_hubness_skewness"] = hubness.skewness
            record[f"{side}_share_never_found"] = hubness.fraction_never_found
            record[f"{side}_most_found"] = hubness.most_found
        return record


def embedding_space(media: Tensor, other: Tensor, relevance: Relevance) -> EmbeddingSpace:
    """Computes the geometry of two kinds of embeddings.

    Args:
        media: [Q, D], L2-normalised.
        other: [M, D], L2-normalised.
        relevance: matching pairs; its `texts` are indices into `other`.
    """
    first, second = (
        torch.from_numpy(side).to(media.device) for side in (relevance.media, relevance.texts)
    )
    gap = (media.double().mean(dim=0) - other.double().mean(dim=0)).norm()
    alignment = (media[first].double() - other[second].double()).square().sum(dim=-1).mean()
    return EmbeddingSpace(
        modality_gap=float(gap),
        alignment=float(alignment),
        uniformity=(_uniformity(media), _uniformity(other)),
        hubness=(hubness_of(media, other), hubness_of(other, media)),
    )


def _uniformity(embeddings: Tensor) -> float:
    chosen = embeddings[_spread(len(embeddings), MAX_UNIFORMITY_ITEMS)].double()
    if len(chosen) < 2:
        return float("nan")
    distances = torch.nn.functional.pdist(chosen).square()
    return float((-2 * distances).exp().mean().log())


def hubness_of(queries: Tensor, gallery: Tensor) -> Hubness:
    """Computes the k-occurrences of the items of a gallery.

    Args:
        queries: [n, D], L2-normalised; at most MAX_QUERIES of them, evenly spaced, are used.
        gallery: [m, D], L2-normalised.
    """
    chosen = queries[_spread(len(queries), MAX_QUERIES)]
    num_neighbours = min(NEIGHBOURS, len(gallery))
    counts = torch.zeros(len(gallery), dtype=torch.int64, device=gallery.device)
    for rows in chosen.split(QUERIES_AT_ONCE):
        nearest = cosine_scores(rows, gallery).topk(num_neighbours, dim=-1).indices
        counts += torch.bincount(nearest.flatten(), minlength=len(gallery))
    occurrences = counts.cpu().numpy()
    deviations = occurrences - occurrences.mean()
    spread = np.sqrt((deviations**2).mean())
    skewness = float((deviations**3).mean() / spread**3) if spread else 0.0
    return Hubness(occurrences, len(chosen), skewness)


def _spread(count: int, at_most: int) -> Tensor:
    """Returns at most `at_most` indices, evenly spaced over `count`."""
    return torch.linspace(0, count - 1, min(count, at_most)).round().long()
