"""How two kinds of embeddings lie in their shared space: the gap between them, how near right pairs
are, how evenly each kind is spread, and whether a few items are found by everything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.ranking import cosine_scores
from eval.metrics.relevance import Relevance

MAX_QUERIES = 4096  # that hubs are counted by
MAX_SPREAD = 2048  # items whose pairs the spread is taken of
NEIGHBOURS = 10  # k of the k-occurrences
QUERIES_AT_ONCE = 512


@dataclass(frozen=True)
class Hubness:
    """How often the items of a gallery are among the nearest of queries (Radovanovic et al. 2010).

    Without hubs all are about equally often: a skewness near 0.
    """

    occurrences: np.ndarray  # int64 [gallery] among the NEIGHBOURS nearest of a query
    num_queries: int
    skewness: float  # of the occurrences

    @property
    def share_never_found(self) -> float:
        """Of the gallery."""
        return float((self.occurrences == 0).mean())

    @property
    def most_found(self) -> float:
        """Share of the queries that the most frequent item is among the nearest of."""
        return float(self.occurrences.max() / self.num_queries)


@dataclass(frozen=True)
class EmbeddingSpace:
    """Of the media of a retrieval, and its texts or other media."""

    modality_gap: float  # distance between the means of both (Liang et al. 2022)
    alignment: float  # mean squared distance of right pairs (Wang and Isola 2020)
    uniformity: tuple[float, float]  # of both: log of the mean of exp(-2 squared distance)
    hubness: tuple[Hubness, Hubness]  # of the second as gallery, and of the first

    def record(self) -> dict[str, float]:
        """The metrics by name, for results.json."""
        record = {"modality_gap": self.modality_gap, "alignment": self.alignment}
        for place, side in enumerate(("media", "other")):
            record[f"{side}_uniformity"] = self.uniformity[place]
            hubness = self.hubness[1 - place]  # of this side as the gallery
            record[f"{side}_hubness_skewness"] = hubness.skewness
            record[f"{side}_share_never_found"] = hubness.share_never_found
            record[f"{side}_most_found"] = hubness.most_found
        return record


def embedding_space(media: Tensor, other: Tensor, relevance: Relevance) -> EmbeddingSpace:
    """The metrics of two kinds of embeddings.

    Args:
        media: [Q, D], L2-normalised.
        other: [M, D], L2-normalised.
        relevance: which belong together; "texts" are the other's.
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
    chosen = embeddings[_spread(len(embeddings), MAX_SPREAD)].double()
    if len(chosen) < 2:
        return float("nan")
    distances = torch.nn.functional.pdist(chosen).square()
    return float((-2 * distances).exp().mean().log())


def hubness_of(queries: Tensor, gallery: Tensor) -> Hubness:
    """How often each item of a gallery is near a query.

    Args:
        queries: [n, D], L2-normalised; of more than MAX_QUERIES, some spread over all.
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
    """Places spread evenly over `count`."""
    return torch.linspace(0, count - 1, min(count, at_most)).round().long()
