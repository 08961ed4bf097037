"""Retrieval in both directions between media items and captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, field_validator

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import read_texts, texts_of
from eval.metrics.relevance import (
    Relevance,
    relevance_of_equal_captions,
    relevance_of_owners,
)
from eval.prompts.class_prompts import read_lines
from eval.tasks.task import CaptionedSection, Outcome, Task

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

    from data_prep.report import html
    from eval.metrics.embedding_space import EmbeddingSpace
    from eval.metrics.intervals import Bootstrap
    from eval.metrics.retrieval import RetrievalResult
    from eval.report.differences import Difference, ResultPair
    from eval.report.gallery import MediaViews
    from eval.tasks.runner import Embeddings


class RetrievalSection(CaptionedSection):
    """Retrieves the captions of each media item, and the media item of each caption.

    Samples carry captions in .json or .txt.
    """

    task: Literal["retrieval"]
    # Text file with one caption per line: wrong captions added to the media-to-text gallery.
    distractor_captions: Path | None = None
    ks: list[PositiveInt] = Field(default=[1, 5, 10], min_length=1)  # depths of recall@k
    # Captions with identical words: each is relevant to its own item only, as in the literature, or
    # to all items with such a caption (merged)
    equal_captions: Literal["own", "merged"] = "own"

    @field_validator("ks")
    @classmethod
    def _check_ks(cls, ks: list[int]) -> list[int]:
        if sorted(set(ks)) != ks:
            raise ValueError(f"expected ascending numbers without duplicates, found {ks}")
        return ks


@dataclass(frozen=True)
class RetrievalTask(Task, section=RetrievalSection):
    """Retrieval between the media items and the captions of a dataset."""

    captions: list[str]  # [M]
    media_of_text: np.ndarray  # [M] int64: caption m describes media item media_of_text[m]
    distractor_captions: list[str]  # describe no item; media-to-text gallery only
    ks: list[int]
    merges_equal_captions: bool = False  # each is relevant to all items with that caption

    dataset_types = ("retrieval",)
    main_metrics = ("mean_recall@1",)
    conditions = ("equal_captions", "captions_sha256", "distractor_captions_sha256")

    @classmethod
    def read(
        cls,
        name: str,
        section: RetrievalSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> RetrievalTask:
        keys: list[str] = []
        captions: list[str] = []
        media_of_text: list[int] = []
        for ordinal, sample in enumerate(read_texts(dataset)):
            of_sample = texts_of(sample, dataset)
            keys.append(sample.key)
            captions += of_sample
            media_of_text += [ordinal] * len(of_sample)
        distractors = []
        if section.distractor_captions is not None:
            distractors = read_lines(section.distractor_captions)
        return cls(
            name,
            dataset,
            keys,
            captions,
            np.array(media_of_text),
            distractors,
            list(section.ks),
            merges_equal_captions=section.equal_captions == "merged",
        )

    @property
    def texts(self) -> list[str]:
        """The captions, followed by the distractors."""
        return self.captions + self.distractor_captions

    @property
    def text_name(self) -> str:
        return f"captions of {self.name}"

    @cached_property
    def relevance(self) -> Relevance:
        """Matching pairs of item and caption.

        Raises:
            InputError: if there are too many.
        """
        if not self.merges_equal_captions:
            return relevance_of_owners(self.media_of_text)
        try:
            return relevance_of_equal_captions(self.media_of_text, self.captions)
        except ValueError as error:
            raise InputError(
                f"evaluations.{self.name}: {error}; set equal_captions: own, or measure a subset"
            ) from None

    def method(self) -> str:
        return "retrieval"

    def details(self) -> str:
        return (
            f"{len(self.captions)} captions, {len(self.distractor_captions)} distractor captions, "
            f"k {self.ks}{', equal captions merged' if self.merges_equal_captions else ''}"
        )

    def notes(self, outcome: Outcome) -> list[str]:
        num_repeated = len(self.captions) - len(set(self.captions))
        if not num_repeated:
            return super().notes(outcome)
        if self.merges_equal_captions:
            return [
                *super().notes(outcome),
                f"{num_repeated} captions are duplicates of others: each is relevant to all items "
                "with that caption (equal_captions: merged); metrics in the literature "
                "count only its own item.",
            ]
        return [
            *super().notes(outcome),
            f"{num_repeated} captions are duplicates of others: each is relevant only to its own "
            "item, which limits the recall that any model can reach.",
        ]

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[RetrievalResult, Tensor]:
        """Returns the result and the embeddings of captions and distractors, [M + X, D]."""
        from eval.metrics.retrieval import retrieve

        num_captions = len(self.captions)
        texts = embeddings.texts(self)
        result = retrieve(
            media,
            texts[:num_captions],
            media_of_text=self.media_of_text,
            relevance=self.relevance,
            distractor_embeddings=texts[num_captions:],
            ks=self.ks,
        )
        return result, texts

    def embedding_space(
        self, media: Tensor, other: Tensor, result: RetrievalResult
    ) -> EmbeddingSpace:
        from eval.metrics.embedding_space import embedding_space

        return embedding_space(media, other[: len(self.captions)], self.relevance)

    def record(self, outcome: Outcome) -> dict[str, Any]:
        from eval.embeddings.store import checksum_of_texts
        from eval.metrics.retrieval import DIRECTIONS

        return {
            "num_media": len(self.dataset),
            "num_captions": len(self.captions),
            "captions_sha256": checksum_of_texts(self.captions),
            "num_repeated_captions": len(self.captions) - len(set(self.captions)),
            "num_distractor_captions": len(self.distractor_captions),
            "distractor_captions_sha256": checksum_of_texts(self.distractor_captions),
            "media_to_text_gallery": outcome.result.media_to_text.gallery_size,
            "text_to_media_gallery": outcome.result.text_to_media.gallery_size,
            "recall": "hit rate: a query succeeds if any right answer is among the first k",
            "true_recall": "share of a query's right answers that are among the first k",
            "equal_captions": "merged" if self.merges_equal_captions else "own",
            "directions": list(DIRECTIONS),
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        from eval.report.predictions import rank_columns

        result = outcome.result
        return {
            ".media_to_text": {"key": self.keys, **rank_columns(result.media_to_text, self.ks)},
            ".text_to_media": {
                "key": [self.keys[item] for item in self.media_of_text],
                "caption": self.captions,
                **rank_columns(result.text_to_media, self.ks),
            },
        }

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        for direction in pair.record["directions"]:
            yield from pair.rank_differences(direction)

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Shows queries in both directions with their nearest answers, and the embedding space."""
        from data_prep.report import html
        from eval.report.gallery import MediaViews, space_blocks

        views, kind = MediaViews(self.dataset), self.dataset.info.media
        blocks = [
            html.heading(f"{kind} to text"),
            *self._media_queries(outcome, views, num_queries=num_queries),
            html.heading(f"text to {kind}"),
            *self._text_queries(outcome, views, num_queries=num_queries),
            *space_blocks(outcome.space, views),
        ]
        note = [
            f"{self.description()}.",
            "In each direction the hardest queries come first, then some from the whole set.",
            *self.notes(outcome),
        ]
        return html.Section(self.name, blocks, note=" ".join(note))

    def _media_queries(
        self, outcome: Outcome, views: MediaViews, *, num_queries: int
    ) -> Iterator[Markup]:
        from eval.report.gallery import media_query, nearest, shown_queries, text_answers

        ranks, texts = outcome.result.media_to_text, self.texts
        queries = shown_queries(ranks.first_ranks(), num_queries=num_queries)
        answers = nearest(outcome.media_embeddings[queries], outcome.other_embeddings)
        for query, found in zip(queries, answers, strict=True):
            right = self.relevance.texts_of(query).tolist()
            yield media_query(
                views.of(query), ranks, query, answers=text_answers(texts, found, right=right)
            )

    def _text_queries(
        self, outcome: Outcome, views: MediaViews, *, num_queries: int
    ) -> Iterator[Markup]:
        from eval.report.gallery import media_answers, nearest, shown_queries, text_query

        ranks = outcome.result.text_to_media
        queries = shown_queries(ranks.first_ranks(), num_queries=num_queries, labels=self.captions)
        answers = nearest(outcome.other_embeddings[queries], outcome.media_embeddings)
        for query, found in zip(queries, answers, strict=True):
            right = self.relevance.media_of(query).tolist()
            yield text_query(
                self.captions[query], ranks, query, answers=media_answers(views, found, right=right)
            )
