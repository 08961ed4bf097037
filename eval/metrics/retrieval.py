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
from eval.metrics.intervals import Score, mean_interval, mean_score, score_without_interval
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
    media_of_text: np.ndarray | None = None,
    relevance: Relevance | None = None,
    distractor_embeddings: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    clusters: tuple[np.ndarray, np.ndarray] | None = None,
    directions: tuple[str, str] = DIRECTIONS,
) -> RetrievalResult:
    """Computes all retrieval metrics in both directions, with intervals and chance levels.

    These are recall@k, mean average precision, mean reciprocal rank, nDCG, and median and mean
    rank.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        media_of_text: [M] integers; caption m describes media item media_of_text[m]; every item
            has at least one caption. Not needed with both of the following.
        relevance: matching pairs of item and caption; None: each caption matches its own item.
        distractor_embeddings: [X, D], L2-normalised captions that describe no item, added to the
            media-to-text gallery.
        ks: depths of recall@k; clipped to the gallery size.
        clusters: ([Q], [M]) integers from 0 without gaps. They are equal for items and captions
            that succeed or fail together; None: for each item and its own captions.
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
    clusters = clusters or (np.arange(len(media_embeddings)), np.asarray(media_of_text))
    for direction, ranked, of_queries in zip(directions, both, clusters, strict=True):
        chance = relevance_at_chance(ranked.num_relevant_of_query, gallery_size=ranked.gallery_size)
        chances = dict(_query_metrics(chance, ks))
        for name, values in _query_metrics(ranked, ks):
            scores[f"{direction}_{name}"] = mean_score(
                values,
                chance=float(chances[name].mean()),
                clusters=of_queries,
                are_hits=name.startswith("recall@"),
            )
        scores |= _rank_scores(ranked.query_ranks(), chance.query_ranks(), direction=direction)
    ranks = [ranked.query_ranks() for ranked in both]
    scores |= _mean_recalls(
        [np.stack([each.hits_at(k) for k in ks], axis=1) for each in ranks],
        ks=ks,
        chances=[
            np.mean([scores[f"{direction}_recall@{k}"].chance for direction in directions])
            for k in ks
        ],
        clusters=clusters,
    )
    return RetrievalResult(scores, *ranks)


def _mean_recalls(
    hits: Sequence[np.ndarray],
    *,
    ks: Sequence[int],
    chances: Sequence[float],
    clusters: Sequence[np.ndarray],
) -> dict[str, Score]:
    """Averages the recalls of both directions.

    Args:
        hits: [queries, ks] in [0, 1] of each direction.
        ks: depths of recall@k.
        chances: [ks] chance level of each mean.
        clusters: [queries] cluster of each query, for each direction.
    """
    scores = {}
    for column, k in enumerate(ks):
        of_k = [each[:, column] for each in hits]
        low, high, method = mean_interval(list(zip(of_k, clusters, strict=True)))
        value = float(np.mean([each.mean() for each in of_k]))
        scores[f"mean_recall@{k}"] = Score(
            value, low, high, float(chances[column]), sum(map(len, hits)), method
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


def _rank_scores(ranks: QueryRanks, chance: QueryRanks, *, direction: str) -> dict[str, Score]:
    """Computes median rank, rounded down to an integer as in papers, and mean rank.

    They have no interval: the median is discrete, and the mean depends on a few large ranks.
    """
    first_ranks = ranks.first_ranks()
    values = {
        "median_rank": (np.floor(np.median(first_ranks)), median_rank_at_chance(chance)),
        "mean_rank": (first_ranks.mean(), chance.first_ranks().mean()),
    }
    return {
        f"{direction}_{name}": score_without_interval(
            value, at_chance, len(first_ranks), reason="of ranks"
        )
        for name, (value, at_chance) in values.items()
    }
