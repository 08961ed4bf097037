"""Counts of irrelevant candidates that beat or tie with each relevant pair, in bounded memory.

The counts are exact. They do not depend on the tile size or on the order of items and captions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.ranking import cosine_scores
from eval.metrics.relevance import Relevance

TILE = 2048  # number of captions, and of media items, scored at once; takes 50 MB


@dataclass(frozen=True)
class PairCounts:
    """Score of each relevant pair and number of its competitors; arrays are [P]."""

    score: np.ndarray  # float32
    media_above: np.ndarray  # captions that score higher for the pair's media item
    media_tied: np.ndarray  # captions that score the same for the pair's media item
    text_above: np.ndarray  # media items that score higher for the pair's caption
    text_tied: np.ndarray  # media items that score the same for the pair's caption


def count_irrelevant(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    relevance: Relevance,
    distractor_embeddings: Tensor | None = None,
    tile: int = TILE,
) -> PairCounts:
    """Counts the irrelevant candidates above and tied with every relevant pair, in both directions.

    Relevant pairs are masked before counting, so that no pair competes with itself or with another
    relevant candidate of its query.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        relevance: matching pairs of media item and caption.
        distractor_embeddings: [X, D], L2-normalised captions that match no item.
        tile: number of captions, and of media items, scored at once; affects memory and speed only.
    """
    device = media_embeddings.device
    media, texts = (
        torch.as_tensor(each, device=device) for each in (relevance.media, relevance.texts)
    )
    pair_scores = _pair_scores(media_embeddings, text_embeddings, media, texts, tile=tile)
    by_media, by_text = _SortedPairs(media), _SortedPairs(texts)
    names = ("media_above", "media_tied", "text_above", "text_tied")
    counts = {name: torch.zeros(len(media), dtype=torch.int64, device=device) for name in names}
    for first_text, text_tile in _tiles(text_embeddings, distractor_embeddings, tile=tile):
        of_texts = by_text.within(first_text, first_text + len(text_tile))
        for first_media in range(0, len(media_embeddings), tile):
            of_media = by_media.within(first_media, first_media + tile)
            media_tile = media_embeddings[first_media : first_media + tile]
            scores = cosine_scores(text_tile, media_tile)  # [texts, media]
            inside = of_texts[
                (media[of_texts] >= first_media) & (media[of_texts] < first_media + tile)
            ]
            scores[texts[inside] - first_text, media[inside] - first_media] = -torch.inf
            for name, rows, pairs, row_of_pair in (
                ("text", scores, of_texts, texts[of_texts] - first_text),
                ("media", scores.T.contiguous(), of_media, media[of_media] - first_media),
            ):
                for chosen in _rounds(row_of_pair):
                    above, tied = _row_counts(rows, row_of_pair[chosen], pair_scores[pairs[chosen]])
                    counts[f"{name}_above"][pairs[chosen]] += above
                    counts[f"{name}_tied"][pairs[chosen]] += tied
    arrays = {name: count.cpu().numpy() for name, count in counts.items()}
    return PairCounts(score=pair_scores.cpu().numpy(), **arrays)


def _rounds(row_of_pair: Tensor) -> Iterator[Tensor]:
    """Yields positions in `row_of_pair` such that no row repeats within a round.

    Args:
        row_of_pair: [pairs] rows in ascending order.
    """
    earlier = torch.arange(len(row_of_pair), device=row_of_pair.device)
    earlier = earlier - torch.searchsorted(row_of_pair, row_of_pair)
    for number in range(int(earlier.max()) + 1 if len(row_of_pair) else 0):
        yield torch.nonzero(earlier == number)[:, 0]


def _row_counts(rows: Tensor, row_of_pair: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Counts the scores above, and equal to, each pair's threshold in its row.

    Args:
        rows: [rows, columns] scores.
        row_of_pair: [pairs] distinct rows in ascending order.
        thresholds: [pairs] score of each pair.

    Returns:
        ([pairs] number above, [pairs] number tied).
    """
    if len(row_of_pair) < len(rows):
        rows = rows[row_of_pair]
    flags = rows > thresholds[:, None], rows == thresholds[:, None]
    # Summed as bytes because summing booleans is ten times slower.
    above, tied = (each.view(torch.uint8).sum(dim=1, dtype=torch.int32) for each in flags)
    return above, tied


def _tiles(texts: Tensor, distractors: Tensor | None, *, tile: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (first index, [tile, D] embeddings) of the captions, then of the distractors."""
    first = 0
    for part in (texts, *([] if distractors is None else [distractors])):
        for block in part.split(tile):
            yield first, block
            first += len(block)


class _SortedPairs:
    """Lookup of the pairs whose item (or caption) lies in a range of indices."""

    def __init__(self, indices: Tensor) -> None:
        self.order = torch.argsort(indices, stable=True)
        self.indices = indices[self.order].contiguous()

    def within(self, start: int, stop: int) -> Tensor:
        """Returns the indices of the pairs whose item is in [start, stop)."""
        bounds = torch.tensor([start, stop], device=self.indices.device)
        first, last = torch.searchsorted(self.indices, bounds).tolist()
        return self.order[first:last]


def _pair_scores(
    media_embeddings: Tensor, text_embeddings: Tensor, media: Tensor, texts: Tensor, *, tile: int
) -> Tensor:
    """Computes the score of each relevant pair, [P], with the same product as all other scores.

    A different operation would differ in the last bit and break ties with equal pairs.
    """
    scores = torch.empty(len(media), device=media.device)
    for pairs, start in _media_blocks(media, tile):
        columns = media_embeddings[start : start + tile]
        tile_scores = cosine_scores(text_embeddings[texts[pairs]], columns)  # [pairs, tile]
        scores[pairs] = tile_scores.gather(1, (media[pairs] - start)[:, None])[:, 0]
    return scores


def _media_blocks(media: Tensor, tile: int) -> Iterator[tuple[Tensor, int]]:
    """Yields (indices of up to `tile` pairs, first media item).

    The media items of these pairs lie within `tile` items, starting with the first.
    """
    for pairs in torch.argsort(media, stable=True).split(tile):
        first, last = int(media[pairs[0]]), int(media[pairs[-1]])
        for start in range(first, last + 1, tile):
            within = pairs[(media[pairs] >= start) & (media[pairs] < start + tile)]
            if len(within):
                yield within, start
