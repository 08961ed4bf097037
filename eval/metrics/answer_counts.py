"""Counts, for every right pair of media item and caption, the wrong answers that beat it: exact, a
tile of scores at a time, and the same for any tile, order of items and order of captions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.ranking import cosine_scores
from eval.metrics.relevance import Relevance

TILE = 2048  # captions, and media items, scored at once: 50 MB


@dataclass(frozen=True)
class PairCounts:
    """What competes with each right pair; arrays are [P]."""

    score: np.ndarray  # float32
    media_above: np.ndarray  # of other captions, for its media item as the query: scored higher
    media_tied: np.ndarray  # likewise, scored the same
    text_above: np.ndarray  # of other media items, for its caption as the query
    text_tied: np.ndarray


def count_wrong_answers(
    media_embeddings: Tensor,
    text_embeddings: Tensor,
    *,
    relevance: Relevance,
    distractor_embeddings: Tensor | None = None,
    tile: int = TILE,
) -> PairCounts:
    """Wrong answers above and level with every right pair, in both directions.

    Right pairs are taken out before anything is counted, so that none meets itself or another right
    answer of its query.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        text_embeddings: [M, D], L2-normalised.
        relevance: the right ones.
        distractor_embeddings: [X, D], L2-normalised captions that are wrong for every item.
        tile: captions, and media items, scored at once: memory and speed only.
    """
    device = media_embeddings.device
    media, texts = (
        torch.as_tensor(each, device=device) for each in (relevance.media, relevance.texts)
    )
    scores_of_pairs = _scores_of_pairs(media_embeddings, text_embeddings, media, texts, tile=tile)
    by_media, by_text = _Sorted(media), _Sorted(texts)
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
            for name, rows, pairs_of_rows, indices in (
                ("text", scores, of_texts, texts[of_texts] - first_text),
                ("media", scores.T.contiguous(), of_media, media[of_media] - first_media),
            ):
                for some in _rounds(indices):
                    numbers = pairs_of_rows[some]
                    above, level = _row_counts(rows, indices[some], scores_of_pairs[numbers])
                    counts[f"{name}_above"][numbers] += above
                    counts[f"{name}_tied"][numbers] += level
    arrays = {name: count.cpu().numpy() for name, count in counts.items()}
    return PairCounts(score=scores_of_pairs.cpu().numpy(), **arrays)


def _rounds(indices: Tensor) -> Iterator[Tensor]:
    """Numbers of pairs, so that no place comes twice in a round.

    Args:
        indices: [pairs] rising.
    """
    earlier = torch.arange(len(indices), device=indices.device) - torch.searchsorted(
        indices, indices
    )
    for number in range(int(earlier.max()) + 1 if len(indices) else 0):
        yield torch.nonzero(earlier == number)[:, 0]


def _row_counts(rows: Tensor, indices: Tensor, bars: Tensor) -> tuple[Tensor, Tensor]:
    """([pairs] how much of its row is above the bar of each pair, [pairs] how much is level).

    Args:
        rows: [indices, columns] scores.
        indices: [pairs] row of each, rising.
        bars: [pairs]
    """
    if len(indices) < len(rows):
        rows = rows[indices]
    flags = rows > bars[:, None], rows == bars[:, None]
    # As bytes: truth values take ten times as long to add up.
    above, level = (each.view(torch.uint8).sum(dim=1, dtype=torch.int32) for each in flags)
    return above, level


def _tiles(texts: Tensor, distractors: Tensor | None, *, tile: int) -> Iterator[tuple[int, Tensor]]:
    """(place of the first, [tile, D] embeddings) of captions, then of distractors."""
    first = 0
    for part in (texts, *([] if distractors is None else [distractors])):
        for block in part.split(tile):
            yield first, block
            first += len(block)


class _Sorted:
    """Finds the pairs whose place is within a range."""

    def __init__(self, indices: Tensor) -> None:
        self.order = torch.argsort(indices, stable=True)
        self.indices = indices[self.order].contiguous()

    def within(self, start: int, stop: int) -> Tensor:
        """Numbers of those pairs."""
        bounds = torch.tensor([start, stop], device=self.indices.device)
        first, last = torch.searchsorted(self.indices, bounds).tolist()
        return self.order[first:last]


def _scores_of_pairs(
    media_embeddings: Tensor, text_embeddings: Tensor, media: Tensor, texts: Tensor, *, tile: int
) -> Tensor:
    """[P] score of each right pair, by the product that all pairs go through: another operation
    differs in the last bit, and a pair would be above or below its equals."""
    scores = torch.empty(len(media), device=media.device)
    for some, start in _neighbours(media, tile):
        columns = media_embeddings[start : start + tile]
        tile_scores = cosine_scores(text_embeddings[texts[some]], columns)  # [pairs, tile]
        scores[some] = tile_scores.gather(1, (media[some] - start)[:, None])[:, 0]
    return scores


def _neighbours(media: Tensor, tile: int) -> Iterator[tuple[Tensor, int]]:
    """(numbers of up to `tile` pairs, first media item), so that all their items are among the
    `tile` items from there on."""
    for pairs in torch.argsort(media, stable=True).split(tile):
        first, last = int(media[pairs[0]]), int(media[pairs[-1]])
        for start in range(first, last + 1, tile):
            some = pairs[(media[pairs] >= start) & (media[pairs] < start + tile)]
            if len(some):
                yield some, start
