"""HTML building blocks of galleries: media items, queries and their nearest answers.

Half of the queries shown are the hardest ones; the rest are spread evenly over the dataset. The
markup is in templates/gallery.html.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from data_prep.media.decode import decode_audio, decode_image
from data_prep.report.html import badge, heading, macros, paragraph, sound, table, thumbnail
from data_prep.shards.sample import media_kind_of
from data_prep.shards.sample_contents import SampleContents
from eval.datasets.datasets import EvaluationSet
from eval.datasets.views import members_of, read_contents
from eval.embeddings.items import ItemSet, MediaSet, TextSet
from eval.metrics.ranking import QueryRanks, cosine_scores
from eval.report.spectrogram import spectrogram_picture

if TYPE_CHECKING:
    from eval.metrics.embedding_space import EmbeddingSpace

NUM_ANSWERS = 5
MAX_HUBS = 5
SOUND_RATE_HZ = 16_000
MAX_VECTOR_SIDE = 64  # rows and columns of a vector that are drawn


def _macros() -> Any:
    return macros("eval.report", "gallery.html")


class ItemViews:
    """Pictures, audio players, texts or numbers of items, each built once."""

    def __init__(self, items: ItemSet) -> None:
        self.items = items
        self.of = lru_cache(maxsize=None)(self._make)

    def _make(self, item: int) -> Markup:
        if isinstance(self.items, TextSet):
            return paragraph(self.items.texts[item])
        members = members_of(self.items.views)
        contents = read_contents(self.items.dataset, item, members=members)
        return Markup("").join(_view_of(contents, member) for member in members)

    def query(self, query: int, ranks: QueryRanks, *, answers: Markup) -> Markup:
        """Builds the view of a query, with its rank and answers.

        Args:
            query: index of the item.
            ranks: ranks of all items as queries.
            answers: result of `answers`.
        """
        if isinstance(self.items, TextSet):
            return text_query(self.items.texts[query], ranks, query, answers=answers)
        return media_query(self.of(query), ranks, query, answers=answers)

    def answers(self, found: Sequence[int], *, right: Sequence[int]) -> Markup:
        """Shows the items that a query found, and a relevant one if all of them are wrong.

        Args:
            found: indices of the answers, best first.
            right: indices of the relevant answers.
        """
        if isinstance(self.items, TextSet):
            return text_answers(self.items.texts, found, right=right)
        return media_answers(self, found, right=right)


class MediaViews(ItemViews):
    """Views of a dataset's images or audio clips."""

    def __init__(self, dataset: EvaluationSet) -> None:
        super().__init__(MediaSet(dataset, []))


def _view_of(contents: SampleContents, member: str) -> Markup:
    """Builds the view of one modality of a sample."""
    if member in contents.texts:
        return paragraph(" / ".join(contents.texts[member]))
    if member in contents.vectors:
        return _macros().image(_numbers_picture(contents.vectors[member]))
    content, extension = contents.media[member], contents.extensions[member]
    if media_kind_of(extension) == "image":
        return _macros().image(thumbnail(decode_image(content, extension), alt=contents.key))
    waveform = decode_audio(content, sample_rate_hz=SOUND_RATE_HZ)
    return _macros().sound(
        thumbnail(spectrogram_picture(waveform), max_side=160, alt="spectrogram"),
        sound(waveform, sample_rate_hz=SOUND_RATE_HZ, max_seconds=3),
    )


def _numbers_picture(vector: np.ndarray) -> Markup:
    """Draws numbers as shades of grey: a row of columns, or one row per time."""
    rows = np.atleast_2d(vector)[:MAX_VECTOR_SIDE, :MAX_VECTOR_SIDE].astype(np.float64)
    low, high = rows.min(), rows.max()
    shades = (255 * (rows - low) / (high - low or 1)).astype(np.uint8)
    if len(shades) == 1:
        shades = np.repeat(shades, max(1, shades.shape[1] // 8), axis=0)
    picture = np.repeat(shades[..., None], 3, axis=2)
    return thumbnail(picture, alt=f"{list(vector.shape)} numbers, {low:.3g} to {high:.3g}")


def shown_queries(
    first_ranks: np.ndarray, *, num_queries: int, labels: Sequence[str] | None = None
) -> list[int]:
    """Chooses the queries to show: first the hardest, then some spread evenly over the rest.

    Args:
        first_ranks: [queries] rank of the first relevant answer.
        num_queries: number of queries to show.
        labels: [queries] labels; only the hardest query of each label is shown.
    """
    by_rank = np.argsort(-first_ranks, kind="stable")
    if labels is not None:
        _, firsts = np.unique([labels[query] for query in by_rank], return_index=True)
        by_rank = by_rank[np.sort(firsts)]
    num_queries = min(num_queries, len(by_rank))
    hardest = by_rank[: num_queries // 2]
    rest = np.sort(by_rank[num_queries // 2 :])
    indices = np.linspace(0, len(rest) - 1, num_queries - len(hardest)).round().astype(int)
    return [*hardest.tolist(), *rest[indices].tolist()]


def nearest(queries: Tensor, gallery: Tensor) -> list[list[int]]:
    """Returns the indices of the gallery items nearest to each query, best first.

    Args:
        queries: [rows, D], L2-normalised.
        gallery: [columns, D], L2-normalised.
    """
    num_answers = min(NUM_ANSWERS, len(gallery))
    return torch.topk(cosine_scores(queries, gallery), num_answers, dim=-1).indices.tolist()


# ------------------------------------------------------------------------------------ blocks


def card(view: Markup, label: str | Markup, *, kind: str = "") -> Markup:
    """Builds a card of a media item and its label; `kind` is "good", "missed" or empty."""
    return _macros().card(view, label, kind)


def cards(blocks: Sequence[Markup]) -> Markup:
    """Joins cards into a grid."""
    return _macros().cards(blocks)


def media_query(view: Markup, ranks: QueryRanks, query: int, *, answers: Markup) -> Markup:
    """Builds the view of a media query, with its rank and answers.

    Args:
        view: view of the media item.
        ranks: ranks of all queries.
        query: index of this query.
        answers: result of `text_answers` or `media_answers`.
    """
    return _macros().media_query(view, _rank_badge(ranks, query), answers)


def text_query(text: str, ranks: QueryRanks, query: int, *, answers: Markup) -> Markup:
    """Builds the view of a text query; other arguments as for `media_query`."""
    return _macros().text_query(text, _rank_badge(ranks, query), answers)


def _rank_badge(ranks: QueryRanks, query: int) -> Markup:
    rank = float(ranks.first_ranks()[query])
    text = f"rank {rank:g} of {ranks.gallery_size}"
    return badge(text, kind="good" if rank <= NUM_ANSWERS else "bad")


def text_answers(texts: Sequence[str], found: Sequence[int], *, right: Sequence[int]) -> Markup:
    """Lists the texts that a query found, and a relevant one if all of them are wrong.

    Args:
        texts: texts of the gallery.
        found: indices of the answers, best first.
        right: indices of the relevant answers.
    """
    missed = None if set(right) & set(found) else texts[right[0]]
    return _macros().text_answers([(texts[text], text in right) for text in found], missed)


def media_answers(views: ItemViews, found: Sequence[int], *, right: Sequence[int]) -> Markup:
    """Shows the media items that a query found, and a relevant one if all of them are wrong.

    Args:
        views: views of the gallery.
        found: indices of the answers, best first.
        right: indices of the relevant answers.
    """
    shown = [
        card(views.of(media), str(rank), kind="good" if media in right else "")
        for rank, media in enumerate(found, start=1)
    ]
    if not set(right) & set(found):
        shown.append(card(views.of(right[0]), "missed", kind="missed"))
    return cards(shown)


def scored_captions(captions: Sequence[str], scores: Sequence[float]) -> Markup:
    """Lists captions with their scores; the first is marked as correct."""
    return _macros().scored_captions(
        [(text, f"{score:.3f}") for text, score in zip(captions, scores, strict=True)]
    )


def space_blocks(space: EmbeddingSpace, views: ItemViews) -> list[Markup]:
    """Builds the metrics of the embedding space, and the media items found most often.

    Args:
        space: metrics of the embedding space.
        views: views of the media items.
    """
    rows = [(name.replace("_", " "), f"{value:.3f}") for name, value in space.record().items()]
    note = (
        "Modality gap: distance between the means of both kinds. Alignment: mean squared distance "
        "of matching pairs. Uniformity: lower means more evenly spread. Hubness: skewness of how "
        "often an item is among the ten nearest to a query; above about 1, a few items are found "
        "by most queries."
    )
    return [
        heading("The shared space"),
        paragraph(note),
        table(("metric", "value"), rows, numeric={1}),
        heading("Found by most queries"),
        _hubs(space, views),
    ]


def _hubs(space: EmbeddingSpace, views: ItemViews) -> Markup:
    """Builds cards of the media items found most often, with the fraction of queries."""
    hubness = space.hubness[1]  # with the media as the gallery
    order = np.argsort(-hubness.occurrences, kind="stable")[:MAX_HUBS].tolist()
    return cards(
        [
            card(views.of(item), f"{hubness.occurrences[item] / hubness.num_queries:.1%}")
            for item in order
        ]
    )
