"""Galleries: classified items, and retrieval queries with their five nearest answers.

Half of what is shown is what the model did worst; the rest is spread evenly over the dataset.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor

from data_prep.media.decode import decode_audio, decode_image
from data_prep.report.html import badge, heading, picture, sound
from data_prep.shards.sample import media_extension_of
from eval.datasets.datasets import EvaluationSet
from eval.metrics.ranking import QueryRanks, cosine_scores
from eval.report.spectrogram import spectrogram_picture
from eval.tasks.runner import Outcome

NUM_ANSWERS = 5
SOUND_RATE_HZ = 16_000


class MediaViews:
    """Pictures or players of a dataset's media items, each made once."""

    def __init__(self, dataset: EvaluationSet) -> None:
        self.dataset = dataset
        self.of = lru_cache(maxsize=None)(self._make)

    def _make(self, ordinal: int) -> Markup:
        sample = self.dataset.read_sample(ordinal)
        extension = media_extension_of(sample.members, self.dataset.info.media)
        content = sample.members[extension]
        if self.dataset.info.media == "audio":
            waveform = decode_audio(content, sample_rate_hz=SOUND_RATE_HZ)
            view = Markup('<div class="sound">{}{}</div>').format(
                picture(spectrogram_picture(waveform), max_side=160, alt="spectrogram"),
                sound(waveform, sample_rate_hz=SOUND_RATE_HZ, max_seconds=3),
            )
        else:
            view = picture(decode_image(content, extension), alt=sample.key)
        return Markup('<div class="media">{}</div>').format(view)


def shown_queries(
    first_ranks: np.ndarray, *, num_queries: int, labels: Sequence[str] | None = None
) -> list[int]:
    """Places of the queries to show: the hardest half first, then some spread over the rest.

    Args:
        first_ranks: [queries] rank of the first right answer.
        num_queries: how many to show.
        labels: of queries with equal labels only the hardest is shown.
    """
    by_rank = np.argsort(-first_ranks, kind="stable")
    if labels is not None:
        _, firsts = np.unique([labels[place] for place in by_rank], return_index=True)
        by_rank = by_rank[np.sort(firsts)]
    num_queries = min(num_queries, len(by_rank))
    hardest = by_rank[: num_queries // 2]
    rest = np.sort(by_rank[num_queries // 2 :])
    indices = np.linspace(0, len(rest) - 1, num_queries - len(hardest)).round().astype(int)
    return [*hardest.tolist(), *rest[indices].tolist()]


def nearest(queries: Tensor, gallery: Tensor) -> list[list[int]]:
    """The gallery's indices nearest to each query, best first.

    Args:
        queries: [rows, D], L2-normalised.
        gallery: [columns, D], L2-normalised.
    """
    num_answers = min(NUM_ANSWERS, len(gallery))
    return torch.topk(cosine_scores(queries, gallery), num_answers, dim=-1).indices.tolist()


def classification_gallery(outcome: Outcome, *, num_items: int) -> Markup:
    """Cards of items with their true class, and the class they were taken for where that differs.

    Args:
        outcome: of a classification task.
        num_items: shown.
    """
    task, predictions = outcome.task, outcome.result.predictions
    views = MediaViews(task.dataset)
    is_wrong = predictions != task.targets
    cards = []
    for item in shown_queries(1.0 + is_wrong, num_queries=num_items):
        true, predicted = (task.class_labels[k] for k in (task.targets[item], predictions[item]))
        label = f"{true}, taken for {predicted}" if is_wrong[item] else true
        cards.append(_card(views.of(item), label, kind="missed" if is_wrong[item] else "good"))
    return Markup('<div class="cards">{}</div>').format(Markup("").join(cards))


def retrieval_gallery(outcome: Outcome, *, num_queries: int) -> list[Markup]:
    """Blocks that show both directions of a retrieval.

    Args:
        outcome: of a retrieval task.
        num_queries: shown per direction.
    """
    views = MediaViews(outcome.task.dataset)
    kind = outcome.task.dataset.info.media
    return [
        heading(f"{kind} to text"),
        *_media_to_text_rows(outcome, views, num_queries=num_queries),
        heading(f"text to {kind}"),
        *_text_to_media_rows(outcome, views, num_queries=num_queries),
    ]


def _media_to_text_rows(outcome: Outcome, views: MediaViews, *, num_queries: int) -> list[Markup]:
    task, ranks = outcome.task, outcome.result.media_to_text
    texts = task.captions + task.distractor_captions
    queries = shown_queries(ranks.first_ranks(), num_queries=num_queries)
    answers = nearest(outcome.media_embeddings[queries], outcome.other_embeddings)
    return [
        Markup(
            '<div class="query beside"><div>{}</div><div><p>{}</p>'
            '<ol class="answers">{}</ol>{}</div></div>'
        ).format(
            views.of(query),
            _rank_badge(ranks, query),
            Markup("").join(_text_answer(texts[text], text in right) for text in found),
            _missed_caption(task.captions, right, found),
        )
        for query, found in zip(queries, answers, strict=True)
        for right in [task.relevance.texts_of(query).tolist()]
    ]


def _text_answer(text: str, is_right: bool) -> Markup:
    if is_right:
        return Markup('<li class="good">{} &#10003;</li>').format(text)
    return Markup("<li>{}</li>").format(text)


def _missed_caption(captions: Sequence[str], right: Sequence[int], found: Sequence[int]) -> Markup:
    if set(right) & set(found):
        return Markup("")
    return Markup('<p class="missed">missed: {}</p>').format(captions[right[0]])


def _text_to_media_rows(outcome: Outcome, views: MediaViews, *, num_queries: int) -> list[Markup]:
    task, ranks = outcome.task, outcome.result.text_to_media
    queries = shown_queries(ranks.first_ranks(), num_queries=num_queries, labels=task.captions)
    answers = nearest(outcome.other_embeddings[queries], outcome.media_embeddings)
    return [
        Markup('<div class="query"><p>{} {}</p><div class="cards">{}</div></div>').format(
            task.captions[query],
            _rank_badge(ranks, query),
            _media_answers(views, found, right=task.relevance.media_of(query).tolist()),
        )
        for query, found in zip(queries, answers, strict=True)
    ]


def _media_answers(views: MediaViews, found: Sequence[int], *, right: Sequence[int]) -> Markup:
    cards = [
        _card(views.of(media), str(place), kind="good" if media in right else "")
        for place, media in enumerate(found, start=1)
    ]
    if not set(right) & set(found):
        cards.append(_card(views.of(right[0]), "missed", kind="missed"))
    return Markup("").join(cards)


def _card(view: Markup, label: str | Markup, *, kind: str) -> Markup:
    mark = Markup(" &#10003;") if kind == "good" else ""
    return Markup('<div class="card {}">{}{}{}</div>').format(kind, view, label, mark)


def _rank_badge(ranks: QueryRanks, query: int) -> Markup:
    rank = float(ranks.first_ranks()[query])
    text = f"rank {rank:g} of {ranks.gallery_size}"
    return badge(text, kind="good" if rank <= NUM_ANSWERS else "bad")


def hubs_gallery(outcome: Outcome, *, num_items: int) -> Markup:
    """Cards of the media items that most queries find, with how many of them.

    Args:
        outcome: of a retrieval task.
        num_items: shown.
    """
    hubness = outcome.space.hubness[1]  # of the media as the gallery
    views = MediaViews(outcome.task.dataset)
    order = np.argsort(-hubness.occurrences, kind="stable")[:num_items].tolist()
    cards = [
        _card(views.of(item), f"{hubness.occurrences[item] / hubness.num_queries:.1%}", kind="")
        for item in order
    ]
    return Markup('<div class="cards">{}</div>').format(Markup("").join(cards))


def media_retrieval_gallery(outcome: Outcome, *, num_queries: int) -> list[Markup]:
    """Queries of one dataset with the nearest items of the other, in both directions.

    Args:
        outcome: of a media retrieval task.
        num_queries: shown per direction.
    """
    task, result = outcome.task, outcome.result
    views = (MediaViews(task.dataset), MediaViews(task.other.dataset))
    embeddings = (outcome.media_embeddings, outcome.other_embeddings)
    ranks_of = (result.media_to_text, result.text_to_media)
    right_of = (task.relevance.texts_of, task.relevance.media_of)
    blocks = []
    for side, direction in enumerate(task.directions):
        queries = shown_queries(ranks_of[side].first_ranks(), num_queries=num_queries)
        answers = nearest(embeddings[side][queries], embeddings[1 - side])
        blocks.append(heading(direction.replace("_", " ")))
        blocks += [
            Markup(
                '<div class="query beside"><div>{}</div><div><p>{}</p>'
                '<div class="cards">{}</div></div></div>'
            ).format(
                views[side].of(query),
                _rank_badge(ranks_of[side], query),
                _media_answers(views[1 - side], found, right=right_of[side](query).tolist()),
            )
            for query, found in zip(queries, answers, strict=True)
        ]
    return blocks


def caption_choice_gallery(outcome: Outcome, *, num_items: int) -> Markup:
    """Cards of items with the captions to choose from, mistakes first.

    Args:
        outcome: of a caption choice task.
        num_items: shown.
    """
    task = outcome.task
    views = MediaViews(task.dataset)
    starts = np.cumsum([0, *map(len, task.captions)])
    hits = np.ones(len(task.captions))
    if task.groups is None:
        hits = outcome.result.hits["caption_accuracy"]
    else:
        for indices, hit in zip(task.groups, outcome.result.hits["group_score"], strict=True):
            hits[indices] = hit
    cards = []
    for item in shown_queries(2.0 - hits, num_queries=num_items):
        texts = outcome.other_embeddings[starts[item] : starts[item + 1]]
        scores = cosine_scores(outcome.media_embeddings[item : item + 1], texts)[0].tolist()
        rows = [
            Markup('<li class="{}">{} <small>{}</small></li>').format(
                "good" if place == 0 else "", caption, f"{score:.3f}"
            )
            for place, (caption, score) in enumerate(zip(task.captions[item], scores, strict=True))
        ]
        label = Markup('<ol class="answers">{}</ol>').format(Markup("").join(rows))
        cards.append(_card(views.of(item), label, kind="good" if hits[item] > 0.5 else "missed"))
    return Markup('<div class="cards">{}</div>').format(Markup("").join(cards))
