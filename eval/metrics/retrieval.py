"""Retrieval between media items and captions, in both directions, exact and in bounded memory.

"recall@k" is what CLIP papers call so: the share of queries that find at least one right answer
among their k nearest (a hit rate). "true_recall@k" is the share of right answers found.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eval.metrics.answer_counts import TILE, count_wrong_answers
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
MAP_DEPTH = 10  # of the cut-off mAP and nDCG


@dataclass(frozen=True)
class RetrievalResult:
    """The metrics of one retrieval, and the rank of every query."""

    scores: dict[str, Score]
    media_to_text: QueryRanks  # one query per media item; or of the first direction
    text_to_media: QueryRanks  # one query per caption; or of the second


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
    """Recalls, mean precision and reciprocal rank, nDCG, median and mean rank in both directions,
    with intervals and chance levels.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        media_of_text: [M] integers; caption m describes media item media_of_text[m]; every item
            owns at least one caption.
        relevance: which captions are right for which items; None: each for its own item.
        distractor_embeddings: [X, D], L2-normalised captions that describe no item; they join the
            gallery of media to text.
        ks: of recall@k; a k above the gallery's size counts as the gallery's size.
        bootstrap: resampling of media items for the intervals.
        directions: what metrics are called by.

    Raises:
        ValueError: an embedding is not finite, or a media item has no caption.
    """
    both = retrieval_answers(
        media_embeddings,
        text_embeddings,
        relevance=relevance or relevance_of_owners(media_of_text),
        distractor_embeddings=distractor_embeddings,
    )
    scores = {}
    clusters_of = (np.arange(len(media_embeddings)), media_of_text)
    for direction, answers, clusters in zip(directions, both, clusters_of, strict=True):
        chance = relevance_at_chance(
            answers.num_relevant_of_query, gallery_size=answers.gallery_size
        )
        chances = dict(_shares(chance, ks))
        for name, values in _shares(answers, ks):
            scores[f"{direction}_{name}"] = mean_score(
                values,
                chance=float(chances[name].mean()),
                clusters=clusters,
                bootstrap=bootstrap,
            )
        scores |= _rank_scores(
            answers.query_ranks(),
            chance.query_ranks(),
            direction=direction,
            clusters=clusters,
            bootstrap=bootstrap,
        )
    ranks = [answers.query_ranks() for answers in both]
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
    """The means of both directions' recalls, by hits [queries, ks] of each. Where the clusters of
    both are the same media items, both see the same draws."""
    values = np.mean([each.mean(axis=0) for each in hits], axis=0)  # [ks]
    resampled = np.zeros((bootstrap.num_samples, len(ks)))
    for each, clusters in zip(hits, clusters_of, strict=True):
        generator, num_clusters = np.random.default_rng(bootstrap.seed), int(clusters.max()) + 1
        for place in range(bootstrap.num_samples):
            drawn = generator.integers(num_clusters, size=num_clusters)
            weights = np.bincount(drawn, minlength=num_clusters)[clusters]
            resampled[place] += weights @ each / weights.sum() / len(hits)
    num_items = int(clusters_of[0].max()) + 1
    scores = {}
    for place, k in enumerate(ks):
        low, high = percentile_interval(resampled[:, place])
        method = "bootstrap over media items"
        if all(each[:, place].min() == each[:, place].max() for each in hits):
            low, high = wilson_interval(values[place] * num_items, num_items)
            method = "Wilson over media items"
        scores[f"mean_recall@{k}"] = Score(
            float(values[place]), low, high, float(chances[place]), sum(map(len, hits)), method
        )
    return scores


def _shares(answers: RankedRelevance, ks: Sequence[int]) -> Iterator[tuple[str, np.ndarray]]:
    """(metric, [Q] its value for each query) of the metrics that are shares, best 1."""
    ranks = answers.query_ranks()
    for k in ks:
        yield f"recall@{k}", ranks.hits_at(k)
    if answers.num_relevant_of_query.max() > 1:  # else they are the same
        for k in ks:
            yield f"true_recall@{k}", answers.true_recall_at(k)
    yield "map", answers.average_precision()
    yield f"map@{MAP_DEPTH}", answers.average_precision(MAP_DEPTH)
    yield f"ndcg@{MAP_DEPTH}", answers.ndcg_at(MAP_DEPTH)
    yield "mrr", answers.reciprocal_rank()


def recall_at_k(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    media_of_text: np.ndarray,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Share of queries whose true match is among the k nearest, in both directions.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        media_of_text: [M] integers; caption m describes media item media_of_text[m].
        ks: see `retrieve`.

    Returns:
        {"media_to_text_recall@1": ..., "text_to_media_recall@1": ...}, each in [0, 1].
    """
    both = retrieval_answers(
        media_embeddings, text_embeddings, relevance=relevance_of_owners(media_of_text)
    )
    return {
        f"{direction}_recall@{k}": float(answers.query_ranks().hits_at(k).mean())
        for direction, answers in zip(DIRECTIONS, both, strict=True)
        for k in ks
    }


def retrieval_answers(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    relevance: Relevance,
    distractor_embeddings: Tensor | None = None,
    tile: int = TILE,
) -> tuple[RankedRelevance, RankedRelevance]:
    """The right answers of media to text and of text to media, holding [tile, tile] scores at a
    time.

    Arguments as in `retrieve`; `tile` changes memory and speed, never the result.
    """
    gallery_size = len(text_embeddings)
    if distractor_embeddings is not None:
        check_finite(distractor_embeddings, name="distractor_embeddings")
        gallery_size += len(distractor_embeddings)
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(text_embeddings, name="text_embeddings")
    _refuse_lonely(relevance.media, len(media_embeddings), what="media item", needs="caption")
    _refuse_lonely(relevance.texts, len(text_embeddings), what="caption", needs="media item")
    counts = count_wrong_answers(
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


def _refuse_lonely(indices: np.ndarray, count: int, *, what: str, needs: str) -> None:
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
