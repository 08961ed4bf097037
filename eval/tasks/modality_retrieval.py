"""Retrieval in both directions between two modalities of the samples of a dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, PositiveInt, model_validator

from data_prep.errors import InputError
from eval.datasets.columns import EvaluatedView
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import read_values
from eval.embeddings.items import ItemSet, read_items
from eval.tasks.task import EvaluationSection, Outcome, Task
from pretrain.settings.views import View

if TYPE_CHECKING:
    from markupsafe import Markup
    from torch import Tensor

    from data_prep.report import html
    from eval.metrics.embedding_space import EmbeddingSpace
    from eval.metrics.intervals import Bootstrap
    from eval.metrics.relevance import Relevance
    from eval.metrics.retrieval import RetrievalResult
    from eval.report.differences import Difference, ResultPair
    from eval.report.gallery import ItemViews
    from eval.tasks.runner import Embeddings


class ModalityRetrievalSection(EvaluationSection):
    """Finds the `right` of each sample with its `left`, such as sounds with images, and vice versa.

    Samples that lack either take no part and are counted.
    """

    task: Literal["modality_retrieval"]
    # A modality that the dataset and the model have, such as image, or {text: title}: a text of the
    # dataset that is encoded as the modality `text`. Every text of a sample is an item
    left: EvaluatedView
    right: EvaluatedView
    ks: list[PositiveInt] = Field(default=[1, 5, 10], min_length=1)  # depths of recall@k
    # Items with equal bytes or words: each matches all samples with such an item (merged), or its
    # own sample only
    equal_contents: Literal["merged", "own"] = "merged"
    # Label of the samples or other key in .json, such as class_name: samples with equal values
    # count as one; null: each by itself
    pair_by: str | None = None

    def views_of(self, dataset: EvaluationSet) -> list[str]:
        """Returns both views; see the base class."""
        return [self.left, self.right]

    @model_validator(mode="after")
    def _check_views(self) -> ModalityRetrievalSection:
        if self.left == self.right:
            raise ValueError(f"expected two views, found {self.left!r} as left and as right")
        if sorted(set(self.ks)) != self.ks:
            raise ValueError(f"ks: expected ascending numbers without duplicates, found {self.ks}")
        return self


@dataclass(frozen=True)
class ModalityRetrievalResult:
    """Result of a retrieval, with the pairs that match."""

    retrieval: RetrievalResult
    relevance: Relevance  # its `texts` are items of the right side
    # Whether an objective of the run reads both modalities; None: not known
    were_trained_together: bool | None

    @property
    def scores(self) -> Mapping[str, Any]:
        """Metrics of the retrieval."""
        return self.retrieval.scores


@dataclass(frozen=True)
class ModalityRetrievalTask(Task, section=ModalityRetrievalSection):
    """Retrieval between two modalities of the same samples."""

    left: ItemSet
    right: ItemSet
    ks: list[int]
    merges_equal_contents: bool
    pair_by: str | None
    groups: np.ndarray  # int64 [Q] samples of equal number match; from 0 without gaps

    dataset_types = ("retrieval",)
    main_metrics = ("mean_recall@1",)
    conditions = ("left", "right", "equal_contents", "pair_by", "right_pairs_sha256")

    @classmethod
    def read(
        cls,
        name: str,
        section: ModalityRetrievalSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> ModalityRetrievalTask:
        keys, values = read_values(dataset, section.pair_by)
        groups = np.arange(len(keys))
        if section.pair_by is not None:
            _, groups = np.unique(values, return_inverse=True)
        return cls(
            name,
            dataset,
            keys,
            left=read_items(dataset, keys, section.left),
            right=read_items(dataset, keys, section.right),
            ks=list(section.ks),
            merges_equal_contents=section.equal_contents == "merged",
            pair_by=section.pair_by,
            groups=groups,
        )

    @property
    def media_sets(self) -> list[ItemSet]:
        return [self.left, self.right]

    @property
    def directions(self) -> tuple[str, str]:
        """Metric prefixes of both directions."""
        left, right = self.left.name, self.right.name
        return f"{left}_to_{right}", f"{right}_to_{left}"

    def description(self) -> str:
        return (
            f"{self.name}: {self.method()}, {self.details()}, {len(self.keys)} samples "
            f"({self.dataset.folder})"
        )

    def method(self) -> str:
        return "retrieval between modalities"

    def details(self) -> str:
        sides = [f"{len(each.owners)} {each.views[0]} items" for each in self.media_sets]
        merged = ", equal contents merged" if self.merges_equal_contents else ""
        paired = f", paired by {self.pair_by}" if self.pair_by else ""
        return f"{' and '.join(sides)}, k {self.ks}{merged}{paired}"

    def row_name(self, outcome: Outcome) -> str:
        """Returns the name, with a remark if the model was never trained on both views together."""
        if outcome.result.were_trained_together is not False:
            return self.name
        return f"{self.name} (emergent)"

    def notes(self, outcome: Outcome) -> list[str]:
        if outcome.result.were_trained_together is not False:
            return super().notes(outcome)
        return [
            *super().notes(outcome),
            f"Emergent: no objective of the run reads {self.left.views[0]} and "
            f"{self.right.views[0]} together.",
        ]

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[ModalityRetrievalResult, Tensor]:
        """Returns the result and the embeddings of the right side, [M, D]."""
        from eval.embeddings.equal_media import number_contents
        from eval.metrics.relevance import (
            SampleItems,
            clusters_of_equal_contents,
            relevance_of_equal_contents,
            relevance_of_samples,
        )
        from eval.metrics.retrieval import retrieve

        other = embeddings.media(self.right)
        left, right = (
            SampleItems(items.owners, number_contents(items, found))
            for items, found in ((self.left, media), (self.right, other))
        )
        pair = relevance_of_equal_contents if self.merges_equal_contents else relevance_of_samples
        try:
            relevance = pair(
                *(replace(each, samples=self.groups[each.samples]) for each in (left, right))
            )
        except ValueError as error:
            raise InputError(
                f"evaluations.{self.name}: {error}; set equal_contents: own, remove pair_by, or "
                "measure a subset"
            ) from None
        result = retrieve(
            media,
            other,
            relevance=relevance,
            # Samples with equal values of pair_by are still drawn independently of one another.
            clusters=clusters_of_equal_contents(left, right),
            ks=self.ks,
            directions=self.directions,
        )
        pairs = embeddings.store.encoder.trained_pairs
        modalities = frozenset(View.parse(items.views[0]).modality for items in self.media_sets)
        together = None if pairs is None else modalities in pairs
        return ModalityRetrievalResult(result, relevance, together), other

    def embedding_space(
        self, media: Tensor, other: Tensor, result: ModalityRetrievalResult
    ) -> EmbeddingSpace:
        from eval.metrics.embedding_space import embedding_space

        return embedding_space(media, other, result.relevance)

    def record(self, outcome: Outcome) -> dict[str, Any]:
        from eval.embeddings.store import checksum_of_arrays

        relevance = outcome.result.relevance
        return {
            "left": self.left.views[0],
            "right": self.right.views[0],
            "trained_together": outcome.result.were_trained_together,
            "num_samples": len(self.keys),
            "num_lacking": self.num_lacking,
            "num_left": len(self.left.owners),
            "num_right": len(self.right.owners),
            "num_right_pairs": len(relevance.media),
            "right_pairs_sha256": checksum_of_arrays(relevance.media, relevance.texts),
            "equal_contents": "merged" if self.merges_equal_contents else "own",
            "pair_by": self.pair_by,
            "directions": list(self.directions),
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        from eval.report.predictions import rank_columns

        result = outcome.result.retrieval
        return {
            f".{direction}": {
                "key": [self.keys[sample] for sample in items.owners],
                **rank_columns(ranks, self.ks),
            }
            for direction, items, ranks in zip(
                self.directions,
                self.media_sets,
                (result.media_to_text, result.text_to_media),
                strict=True,
            )
        }

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        for direction in pair.record["directions"]:
            yield from pair.rank_differences(direction)

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Shows queries of each side with the nearest items of the other."""
        from data_prep.report import html
        from eval.report.gallery import ItemViews, space_blocks

        views = (ItemViews(self.left), ItemViews(self.right))
        blocks = []
        for side, direction in enumerate(self.directions):
            blocks.append(html.heading(direction.replace("_", " ")))
            blocks += self._queries(outcome, views, side, num_queries=num_queries)
        blocks += space_blocks(outcome.space, views[0])
        return html.Section(self.name, blocks, note=self.report_note(outcome))

    def _queries(
        self,
        outcome: Outcome,
        views: tuple[ItemViews, ItemViews],
        side: int,
        *,
        num_queries: int,
    ) -> Iterator[Markup]:
        """Yields queries from one side, 0 or 1, with their answers from the other."""
        from eval.report.gallery import nearest, shown_queries

        result, relevance = outcome.result.retrieval, outcome.result.relevance
        embeddings = (outcome.media_embeddings, outcome.other_embeddings)
        ranks = (result.media_to_text, result.text_to_media)[side]
        right_of = (relevance.texts_of, relevance.media_of)[side]
        queries = shown_queries(ranks.first_ranks(), num_queries=num_queries)
        answers = nearest(embeddings[side][queries], embeddings[1 - side])
        for query, found in zip(queries, answers, strict=True):
            right = views[1 - side].answers(found, right=right_of(query).tolist())
            yield views[side].query(query, ranks, answers=right)
