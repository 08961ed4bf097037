"""Retrieval between media items and captions, in both directions, exact and in bounded memory.

"recall@k" is defined as in CLIP papers: the fraction of queries with at least one relevant
candidate among their k nearest (a hit rate). "true_recall@k" is the fraction of a query's relevant
candidates that are among its k nearest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eval.metrics.answer_counts import TILE, count_irrelevant
from eval.metrics.intervals import (
    Bootstrap,
    Score,
    bootstrap_interval,
    mean_score,
    percentile_interval,
    weighted_mean,
    weighted_median,
    wilson_interval,
)
from eval.metrics.ranked_relevance import RankedRelevance, ranked_relevance, relevance_at_chance
from eval.metrics.ranking import QueryRanks, check_finite, median_rank_at_chance
from eval.metrics.relevance import Relevance, relevance_of_owners

DIRECTIONS = ("media_to_text", "text_to_media")
MAP_DEPTH = 10  # rank at which mAP@k and nDCG@k are cut off


@dataclass(frozen=True)
class RetrievalResult:
    """Metrics of one retrieval, and the rank of every query."""

    scores: dict[str, Score]
    media_to_text: QueryRanks  # first direction: one query per media item
    text_to_media: QueryRanks  # second direction: one query per caption


def retrieve(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    media_of_text: np.ndarray,
    relevance: Relevance | None = None,
    distractor_embeddings: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    bootstrap: Bootstrap,
    directions: tuple[str, str] = DIRECTIONS,
) -> RetrievalResult:
    """Computes all retrieval metrics in both directions, with intervals and chance levels.

    These are recall@k, mean average precision, mean reciprocal rank, nDCG, and median and mean
    rank.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        media_of_text: [M] integers; caption m describes media item media_of_text[m]; every item
            has at least one caption.
        relevance: matching pairs of item and caption; None: each caption matches its own item.
        distractor_embeddings: [X, D], L2-normalised captions that describe no item, added to the
            media-to-text gallery.
        ks: depths of recall@k; clipped to the gallery size.
        bootstrap: resampling of media items for the intervals.
        directions: prefixes of the metrics' names.

    Raises:
        ValueError: if an embedding is not finite, or a media item has no caption.
    """
    both = retrieval_relevance(
        media_embeddings,
        text_embeddings,
        relevance=relevance or relevance_of_owners(media_of_text),
        distractor_embeddings=distractor_embeddings,
    )
    scores = {}
    clusters_of = (np.arange(len(media_embeddings)), media_of_text)
    for direction, ranked, clusters in zip(directions, both, clusters_of, strict=True):
        chance = relevance_at_chance(ranked.num_relevant_of_query, gallery_size=ranked.gallery_size)
        chances = dict(_query_metrics(chance, ks))
        for name, values in _query_metrics(ranked, ks):
            scores[f"{direction}_{name}"] = mean_score(
                values,
                chance=float(chances[name].mean()),
                clusters=clusters,
                bootstrap=bootstrap,
            )
        scores |= _rank_scores(
            ranked.query_ranks(),
            chance.query_ranks(),
            direction=direction,
            clusters=clusters,
            bootstrap=bootstrap,
        )
    ranks = [ranked.query_ranks() for ranked in both]
    scores |= _mean_recalls(
        [np.stack([each.hits_at(k) for k in ks], axis=1) for each in ranks],
        ks=ks,
        chances=[
            np.mean([scores[f"{direction}_recall@{k}"].chance for direction in directions])
            for k in ks
        ],
        clusters_of=clusters_of,
        bootstrap=bootstrap,
    )
    return RetrievalResult(scores, *ranks)


def _mean_recalls(
    hits: Sequence[np.ndarray],
    *,
    ks: Sequence[int],
    chances: Sequence[float],
    clusters_of: Sequence[np.ndarray],
    bootstrap: Bootstrap,
) -> dict[str, Score]:
    """Averages the recalls of both directions.

    Both directions use the same draws if their clusters are the same media items.

    Args:
        hits: [queries, ks] in [0, 1] of each direction.
        ks: depths of recall@k.
        chances: [ks] chance level of each mean.
        clusters_of: [queries] media item of each query, for each direction.
        bootstrap: resampling of media items.
    """
    values = np.mean([each.mean(axis=0) for each in hits], axis=0)  # [ks]
    resampled = np.zeros((bootstrap.num_samples, len(ks)))
    for each, clusters in zip(hits, clusters_of, strict=True):
        generator, num_clusters = np.random.default_rng(bootstrap.seed), int(clusters.max()) + 1
        for sample in range(bootstrap.num_samples):
            drawn = generator.integers(num_clusters, size=num_clusters)
            weights = np.bincount(drawn, minlength=num_clusters)[clusters]
            resampled[sample] += weights @ each / weights.sum() / len(hits)
    num_items = int(clusters_of[0].max()) + 1
    scores = {}
    for column, k in enumerate(ks):
        low, high = percentile_interval(resampled[:, column])
        method = "bootstrap over media items"
        if all(each[:, column].min() == each[:, column].max() for each in hits):
            low, high = wilson_interval(values[column] * num_items, num_items)
            method = "Wilson over media items"
        scores[f"mean_recall@{k}"] = Score(
            float(values[column]), low, high, float(chances[column]), sum(map(len, hits)), method
        )
    return scores


def _query_metrics(ranked: RankedRelevance, ks: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (metric name, [Q] value per query) of each metric in [0, 1], where 1 is best."""
    ranks = ranked.query_ranks()
    for k in ks:
        yield f"recall@{k}", ranks.hits_at(k)
    if ranked.num_relevant_of_query.max() > 1:  # otherwise equal to recall@k
        for k in ks:
            yield f"true_recall@{k}", ranked.true_recall_at(k)
    yield "map", ranked.average_precision()
    yield f"map@{MAP_DEPTH}", ranked.average_precision(MAP_DEPTH)
    yield f"ndcg@{MAP_DEPTH}", ranked.ndcg_at(MAP_DEPTH)
    yield "mrr", ranked.reciprocal_rank()


def recall_at_k(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    media_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Computes recall at k in both directions: the fraction of queries with a match in the top k.

    An item may have several captions; retrieving any one of them counts.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        media_of_text: [M] integers; caption m describes media item media_of_text[m].
        ks: depths; clipped to the gallery size.

    Returns:
        {"media_to_text_recall@1": ..., "text_to_media_recall@1": ...}, each in [0, 1].
    """
    both = retrieval_relevance(
        media_embeddings, text_embeddings, relevance=relevance_of_owners(media_of_text)
    )
    return {
        f"{direction}_recall@{k}": float(ranked.query_ranks().hits_at(k).mean())
        for direction, ranked in zip(DIRECTIONS, both, strict=True)
        for k in ks
    }


def retrieval_relevance(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    relevance: Relevance,
    distractor_embeddings: Tensor | None = None,
    tile: int = TILE,
) -> tuple[RankedRelevance, RankedRelevance]:
    """Ranks the relevant candidates of every query, in both directions.

    At most [tile, tile] scores are in memory at once.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        relevance: matching pairs of item and caption; every item and caption has at least one.
        distractor_embeddings: [X, D], L2-normalised captions that describe no item.
        tile: number of captions, and of media items, scored at once; affects memory and speed only.

    Returns:
        (media to text, text to media).

    Raises:
        ValueError: if an embedding is not finite, or an item or caption has no match.
    """
    gallery_size = len(text_embeddings)
    if distractor_embeddings is not None:
        check_finite(distractor_embeddings, name="distractor_embeddings")
        gallery_size += len(distractor_embeddings)
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(text_embeddings, name="text_embeddings")
    _refuse_unmatched(relevance.media, len(media_embeddings), what="media item", needs="caption")
    _refuse_unmatched(relevance.texts, len(text_embeddings), what="caption", needs="media item")
    counts = count_irrelevant(
        media_embeddings,
        text_embeddings,
        relevance=relevance,
        distractor_embeddings=distractor_embeddings,
        tile=tile,
    )
    media_to_text = ranked_relevance(
        relevance.media,
        counts.score,
        num_irrelevant_above=counts.media_above,
        num_irrelevant_tied=counts.media_tied,
        gallery_size=gallery_size,
    )
    text_to_media = ranked_relevance(
        relevance.texts,
        counts.score,
        num_irrelevant_above=counts.text_above,
        num_irrelevant_tied=counts.text_tied,
        gallery_size=len(media_embeddings),
    )
    return media_to_text, text_to_media


def _refuse_unmatched(indices: np.ndarray, count: int, *, what: str, needs: str) -> None:
    missing = np.flatnonzero(np.bincount(indices, minlength=count) == 0)
    if len(missing):
        raise ValueError(f"{what} {missing[0]} has no {needs}; every {what} needs at least one")


def _rank_scores(
    ranks: QueryRanks,
    chance: QueryRanks,
    *,
    direction: str,
    clusters: np.ndarray,
    bootstrap: Bootstrap,
) -> dict[str, Score]:
    first_ranks = ranks.first_ranks()
    chance_levels = {
        "median_rank": float(median_rank_at_chance(chance)),
        "mean_rank": float(chance.first_ranks().mean()),
    }
    once = np.ones(len(first_ranks), dtype=np.int64)
    scores = {}
    for name, statistic in (("median_rank", weighted_median), ("mean_rank", weighted_mean)):
        low, high = bootstrap_interval(
            first_ranks, clusters=clusters, statistic=statistic, bootstrap=bootstrap
        )
        scores[f"{direction}_{name}"] = Score(
            value=statistic(first_ranks, once),
            low=low,
            high=high,
            chance=chance_levels[name],
            num_queries=len(first_ranks),
            interval="bootstrap over media items",
        )
    return scores
