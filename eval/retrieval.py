"""Retrieval between media items and captions, in both directions, exact and in bounded memory.

"recall@k" is what CLIP papers call so: the share of queries that find at least one right answer
among their k nearest (a hit rate). It is not the share of right answers found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.intervals import (
    Bootstrap,
    Score,
    bootstrap_interval,
    rate_interval,
    weighted_mean,
    weighted_median,
)
from eval.ranking import (
    QueryRanks,
    chance_ranks,
    check_finite,
    cosine_scores,
    median_rank_at_chance,
)

TILE = 2048  # captions, and media items, scored at once: 50 MB


@dataclass(frozen=True)
class RetrievalResult:
    """The figures of one retrieval, and the rank of every query."""

    scores: dict[str, Score]
    media_to_text: QueryRanks  # one query per media item
    text_to_media: QueryRanks  # one query per caption


def retrieve(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    media_of_text: np.ndarray,
    distractor_embeddings: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
    bootstrap: Bootstrap,
) -> RetrievalResult:
    """Recall@k, median and mean rank in both directions, with intervals and chance levels.

    A media item may own several captions; finding any one of them counts. A caption that stands
    at two items is right only for the item it belongs to.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        media_of_text: [M] integers; caption m describes media item media_of_text[m]; every item
            owns at least one caption.
        distractor_embeddings: [X, D], L2-normalised captions that describe no item; they join the
            gallery of media to text.
        ks: of recall@k; a k above the gallery's size counts as the gallery's size.
        bootstrap: resampling of media items for the intervals.

    Raises:
        ValueError: an embedding is not finite, or a media item has no caption.
    """
    media_to_text, text_to_media = retrieval_ranks(
        media_embeddings,
        text_embeddings,
        media_of_text=media_of_text,
        distractor_embeddings=distractor_embeddings,
    )
    num_captions = np.bincount(media_of_text, minlength=len(media_embeddings))
    scores = {}
    for direction, ranks, num_right, clusters in (
        ("media_to_text", media_to_text, num_captions, np.arange(len(num_captions))),
        ("text_to_media", text_to_media, np.ones_like(media_of_text), media_of_text),
    ):
        chance = chance_ranks(num_right, gallery_size=ranks.gallery_size)
        for k in ks:
            scores[f"{direction}_recall@{k}"] = _recall_score(
                ranks.hits_at(k), chance.hits_at(k), clusters=clusters, bootstrap=bootstrap
            )
        scores |= _rank_scores(
            ranks, chance, direction=direction, clusters=clusters, bootstrap=bootstrap
        )
    return RetrievalResult(scores, media_to_text, text_to_media)


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
    both = retrieval_ranks(media_embeddings, text_embeddings, media_of_text=media_of_text)
    return {
        f"{direction}_recall@{k}": float(ranks.hits_at(k).mean())
        for direction, ranks in zip(("media_to_text", "text_to_media"), both, strict=True)
        for k in ks
    }


def retrieval_ranks(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    media_of_text: np.ndarray,
    distractor_embeddings: Tensor | None = None,
    tile: int = TILE,
) -> tuple[QueryRanks, QueryRanks]:
    """Ranks of media to text and of text to media, holding [tile, tile] scores at a time.

    Arguments as in `retrieve`; `tile` changes memory and speed, never the result.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(text_embeddings, name="text_embeddings")
    owners = torch.as_tensor(media_of_text, device=media_embeddings.device).long()
    gallery = text_embeddings
    if distractor_embeddings is not None and len(distractor_embeddings) > 0:
        check_finite(distractor_embeddings, name="distractor_embeddings")
        gallery = torch.cat([text_embeddings, distractor_embeddings])
        owners = torch.cat([owners, owners.new_full((len(distractor_embeddings),), -1)])
    num_media, num_captions = len(media_embeddings), len(text_embeddings)
    right_scores = _scores_of_right_pairs(
        media_embeddings, text_embeddings, owners=owners[:num_captions], tile=tile
    )
    best, num_best = _best_caption_scores(right_scores, owners[:num_captions], num_media)
    # A distractor is no query: no score is above or level with NaN.
    of_query = torch.cat(
        [right_scores, right_scores.new_full((len(gallery) - num_captions,), torch.nan)]
    )

    counts = _count_wrong_answers(
        media_embeddings, gallery, owners=owners, of_query=of_query, best=best, tile=tile
    )
    return _both_ranks(counts, num_best, num_captions=num_captions, gallery_size=len(gallery))


def _count_wrong_answers(
    media_embeddings: Tensor,
    gallery: Tensor,
    *,
    owners: Tensor,
    of_query: Tensor,
    best: Tensor,
    tile: int,
) -> dict[str, Tensor]:
    """Wrong answers above and level with `best` [Q] of each media item and `of_query` [M + X] of
    each caption, tile by tile."""
    counts = {
        "media_above": torch.zeros_like(best, dtype=torch.int64),
        "media_level": torch.zeros_like(best, dtype=torch.int64),
        "text_above": torch.zeros_like(of_query, dtype=torch.int64),
        "text_level": torch.zeros_like(of_query, dtype=torch.int64),
    }
    for text_start in range(0, len(gallery), tile):
        texts = slice(text_start, text_start + tile)
        for media_start in range(0, len(media_embeddings), tile):
            media = slice(media_start, media_start + tile)
            scores = cosine_scores(gallery[texts], media_embeddings[media])  # [tile, tile]
            _mask_right_pairs(scores, owners[texts] - media_start)
            counts["text_above"][texts] += (scores > of_query[texts, None]).sum(dim=1)
            counts["text_level"][texts] += (scores == of_query[texts, None]).sum(dim=1)
            counts["media_above"][media] += (scores > best[media]).sum(dim=0)
            counts["media_level"][media] += (scores == best[media]).sum(dim=0)
    return counts


def _both_ranks(
    counts: dict[str, Tensor], num_best: Tensor, *, num_captions: int, gallery_size: int
) -> tuple[QueryRanks, QueryRanks]:
    arrays = {name: count.cpu().numpy() for name, count in counts.items()}
    media_to_text = QueryRanks(
        num_above=arrays["media_above"],
        num_level=arrays["media_level"],
        num_right_level=num_best.cpu().numpy(),
        gallery_size=gallery_size,
    )
    text_to_media = QueryRanks(
        num_above=arrays["text_above"][:num_captions],
        num_level=arrays["text_level"][:num_captions],
        num_right_level=np.ones(num_captions, dtype=np.int64),
        gallery_size=len(num_best),
    )
    return media_to_text, text_to_media


def _scores_of_right_pairs(
    media_embeddings: Tensor, text_embeddings: Tensor, *, owners: Tensor, tile: int
) -> Tensor:
    """[M] score of each caption with its own media item, by the product that all pairs go through:
    another operation differs in the last bit, and a pair would be above or below itself."""
    right_scores = torch.empty(len(owners), device=owners.device)
    order = torch.argsort(owners)
    for captions in order.split(tile):
        first, last = int(owners[captions[0]]), int(owners[captions[-1]])
        for start in range(first, last + 1, tile):
            inside = captions[(owners[captions] >= start) & (owners[captions] < start + tile)]
            scores = cosine_scores(
                text_embeddings[inside], media_embeddings[start : start + tile]
            )  # [captions, tile]
            right_scores[inside] = scores.gather(1, (owners[inside] - start)[:, None])[:, 0]
    return right_scores


def _best_caption_scores(
    right_scores: Tensor, owners: Tensor, num_media: int
) -> tuple[Tensor, Tensor]:
    """[Q] score of each item's best caption, and [Q] how many of its captions have that score."""
    best = right_scores.new_full((num_media,), -torch.inf)
    best.scatter_reduce_(0, owners, right_scores, reduce="amax")
    if bool(torch.isinf(best).any()):
        missing = int(torch.nonzero(torch.isinf(best))[0])
        raise ValueError(f"media item {missing} has no caption; every item needs at least one")
    is_best = (right_scores == best[owners]).long()
    return best, torch.zeros_like(best, dtype=torch.int64).scatter_add_(0, owners, is_best)


def _mask_right_pairs(scores: Tensor, columns: Tensor) -> None:
    """Takes right pairs out of a tile, so that no pair is counted against itself."""
    rows = torch.nonzero((columns >= 0) & (columns < scores.shape[1])).flatten()
    scores[rows, columns[rows]] = -torch.inf


def _recall_score(
    hits: np.ndarray, chance_hits: np.ndarray, *, clusters: np.ndarray, bootstrap: Bootstrap
) -> Score:
    low, high, method = rate_interval(hits, clusters=clusters, bootstrap=bootstrap)
    return Score(float(hits.mean()), low, high, float(chance_hits.mean()), len(hits), method)


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
