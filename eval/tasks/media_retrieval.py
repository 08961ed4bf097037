"""Retrieval in both directions between the media items of two datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, PositiveInt

from data_prep.errors import InputError
from eval.datasets.columns import DatasetLocation
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import read_values
from eval.datasets.views import samples_having
from eval.embeddings.items import ItemSet, MediaSet
from eval.metrics.relevance import (
    Relevance,
    clusters_of_equal_values,
    relevance_of_equal_values,
)
from eval.tasks.task import EvaluationSection, Outcome, Task

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


class MediaRetrievalSection(EvaluationSection):
    """Finds media items of one dataset with queries from another, such as sounds from images.

    Two items match if they have the same key, or the same value of `pair_by` in .json.
    """

    task: Literal["media_retrieval"]
    other: DatasetLocation  # the other dataset
    other_split: str = "test"
    pair_by: str | None = None  # key in .json; null: match by sample key
    ks: list[PositiveInt] = Field(default=[1, 5, 10], min_length=1)  # depths of recall@k

    def locations(self) -> list[tuple[str, str]]:
        return [*super().locations(), (self.other, self.other_split)]


@dataclass(frozen=True)
class MediaRetrievalTask(Task, section=MediaRetrievalSection):
    """Retrieval between the media items of two datasets."""

    other: MediaSet  # M items
    relevance: Relevance  # its `texts` are items of the other dataset
    ks: list[int]

    dataset_types = ("retrieval",)
    main_metrics = ("mean_recall@1",)
    conditions = ("other_fingerprint", "right_pairs_sha256")

    @classmethod
    def read(
        cls,
        name: str,
        section: MediaRetrievalSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> MediaRetrievalTask:
        other = sets.open(section.other, split=section.other_split, columns=section.columns)
        other = samples_having(other, section.views_of(other))
        if other.info.media == dataset.info.media:
            raise InputError(
                f"evaluations.{name}: expected media of two kinds, found {other.info.media} in "
                f"{dataset.folder} and in {other.folder}"
            )
        keys, values = read_values(dataset, section.pair_by)
        other_keys, other_values = read_values(other, section.pair_by)
        for own, others, holder in (
            (values, other_values, dataset),
            (other_values, values, other),
        ):
            unpaired = sorted(set(own) - set(others))
            if unpaired:
                raise InputError(
                    f"evaluations.{name}: {holder.folder}: {section.pair_by or 'key'} "
                    f"{unpaired[0]!r} and {len(unpaired) - 1} others have no match in the other "
                    "dataset"
                )
        try:
            relevance = relevance_of_equal_values(values, other_values)
        except ValueError as error:
            raise InputError(
                f"evaluations.{name}: {error}; remove pair_by, or measure subsets"
            ) from None
        return cls(name, dataset, keys, MediaSet(other, other_keys), relevance, list(section.ks))

    @property
    def media_sets(self) -> list[ItemSet]:
        return [*super().media_sets, self.other]

    @property
    def directions(self) -> tuple[str, str]:
        """Metric prefixes of both directions."""
        kind, other = self.dataset.info.media, self.other.dataset.info.media
        return f"{kind}_to_{other}", f"{other}_to_{kind}"

    def method(self) -> str:
        return "media retrieval"

    def details(self) -> str:
        other = self.other.dataset
        return f"{len(other)} {other.info.media} items of {other.folder}, k {self.ks}"

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[RetrievalResult, Tensor]:
        """Returns the result and the embeddings of the other dataset's items, [M, D]."""
        from eval.metrics.retrieval import retrieve

        other = embeddings.media(self.other)
        result = retrieve(
            media,
            other,
            relevance=self.relevance,
            clusters=clusters_of_equal_values(self.relevance),
            ks=self.ks,
            directions=self.directions,
        )
        return result, other

    def embedding_space(
        self, media: Tensor, other: Tensor, result: RetrievalResult
    ) -> EmbeddingSpace:
        from eval.metrics.embedding_space import embedding_space

        return embedding_space(media, other, self.relevance)

    def record(self, outcome: Outcome) -> dict[str, Any]:
        from eval.embeddings.store import checksum_of_arrays

        other = self.other.dataset
        return {
            "num_media": len(self.dataset),
            "num_other_media": len(other),
            "num_right_pairs": len(self.relevance.media),
            "right_pairs_sha256": checksum_of_arrays(self.relevance.media, self.relevance.texts),
            "other_folder": str(other.folder),
            "other_fingerprint": other.fingerprint,
            "directions": list(self.directions),
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        from eval.report.predictions import rank_columns

        ranks = (outcome.result.media_to_text, outcome.result.text_to_media)
        keys_of = (self.keys, self.other.keys)
        return {
            f".{direction}": {"key": keys, **rank_columns(each, self.ks)}
            for direction, keys, each in zip(self.directions, keys_of, ranks, strict=True)
        }

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        for direction in pair.record["directions"]:
            yield from pair.rank_differences(direction)

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Shows queries of each dataset with the nearest items of the other."""
        from data_prep.report import html
        from eval.report.gallery import MediaViews, space_blocks

        views = (MediaViews(self.dataset), MediaViews(self.other.dataset))
        blocks = []
        for side, direction in enumerate(self.directions):
            blocks.append(html.heading(direction.replace("_", " ")))
            blocks += self._queries(outcome, views, side, num_queries=num_queries)
        blocks += space_blocks(outcome.space, views[0])
        return html.Section(self.name, blocks, note=self.description())

    def _queries(
        self,
        outcome: Outcome,
        views: tuple[MediaViews, MediaViews],
        side: int,
        *,
        num_queries: int,
    ) -> Iterator[Markup]:
        """Yields queries from one side, 0 or 1, with their answers from the other."""
        from eval.report.gallery import media_answers, media_query, nearest, shown_queries

        result = outcome.result
        embeddings = (outcome.media_embeddings, outcome.other_embeddings)
        ranks = (result.media_to_text, result.text_to_media)[side]
        right_of = (self.relevance.texts_of, self.relevance.media_of)[side]
        queries = shown_queries(ranks.first_ranks(), num_queries=num_queries)
        answers = nearest(embeddings[side][queries], embeddings[1 - side])
        for query, found in zip(queries, answers, strict=True):
            right = right_of(query).tolist()
            yield media_query(
                views[side].of(query),
                ranks,
                query,
                answers=media_answers(views[1 - side], found, right=right),
            )
