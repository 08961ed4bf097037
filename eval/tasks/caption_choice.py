"""Choice of the correct caption or media item among a few nearly identical ones."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import negative_captions_of, read_texts, texts_of, value_of
from eval.tasks.task import CaptionedSection, Outcome, Task

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.metrics.caption_choice import CaptionChoiceResult
    from eval.metrics.intervals import Bootstrap
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings


class CaptionChoiceSection(CaptionedSection):
    """Chooses the correct caption or media item among a few (SugarCrepe, Winoground).

    Samples carry their caption in .txt or .json, and wrong captions as "negative_captions" in
    .json.
    """

    task: Literal["caption_choice"]
    # Key in .json; items with the same value are each other's wrong answers. null: the wrong
    # answers are negative_captions
    group_by: str | None = None


@dataclass(frozen=True)
class CaptionChoiceTask(Task, section=CaptionChoiceSection):
    """Choice of the correct caption or media item among a few."""

    captions: list[list[str]]  # [Q] captions of each item, the correct one first
    groups: list[list[int]] | None  # indices of items that are each other's wrong answers

    dataset_types = ("retrieval",)
    main_metrics = ("caption_accuracy", "group_score")
    conditions = ("captions_sha256", "num_groups")

    @classmethod
    def read(
        cls,
        name: str,
        section: CaptionChoiceSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> CaptionChoiceTask:
        keys, captions, members = [], [], defaultdict(list)
        for ordinal, sample in enumerate(read_texts(dataset)):
            keys.append(sample.key)
            right = texts_of(sample, dataset)[:1]
            if section.group_by is None:
                captions.append(right + negative_captions_of(sample))
            else:
                captions.append(right)
                members[value_of(sample, section.group_by)].append(ordinal)
        alone = [value for value, indices in members.items() if len(indices) < 2]
        if alone:
            raise InputError(
                f"evaluations.{name}: {dataset.folder}: {section.group_by} {alone[0]!r}: expected "
                "two samples or more, found one"
            )
        groups = list(members.values()) if section.group_by is not None else None
        return cls(name, dataset, keys, captions, groups)

    @property
    def texts(self) -> list[str]:
        """All captions, item by item."""
        return list(chain.from_iterable(self.captions))

    @property
    def text_name(self) -> str:
        return f"captions of {self.name}"

    def method(self) -> str:
        return "caption choice"

    def details(self) -> str:
        if self.groups is not None:
            return f"{len(self.groups)} groups"
        return f"{len(self.texts) - len(self.captions)} wrong captions"

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[CaptionChoiceResult, Tensor]:
        """Returns the result and the embeddings of all captions, [M, D]."""
        from eval.metrics.caption_choice import choose_captions, choose_in_groups

        captions = embeddings.texts(self)
        if self.groups is not None:
            result = choose_in_groups(media, captions, groups=self.groups, seed=bootstrap.seed)
        else:
            num_captions = [len(of_item) for of_item in self.captions]
            result = choose_captions(media, captions, num_captions=num_captions)
        return result, captions

    def record(self, outcome: Outcome) -> dict[str, Any]:
        from eval.embeddings.store import checksum_of_texts

        return {
            "num_queries": len(self.dataset),
            "num_captions": len(self.texts),
            "captions_sha256": checksum_of_texts(self.texts),
            "num_groups": None if self.groups is None else len(self.groups),
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        keys = self.keys
        if self.groups is not None:
            keys = [" ".join(self.keys[item] for item in indices) for indices in self.groups]
        return {"": {"key": keys, **outcome.result.hits}}

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        yield from pair.mean_differences({metric: metric for metric in pair.record["scores"]})

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Shows items with their candidate captions, mistakes first."""
        from data_prep.report import html
        from eval.metrics.ranking import cosine_scores
        from eval.report.gallery import MediaViews, card, cards, scored_captions, shown_queries

        views, hits = MediaViews(self.dataset), self._hits(outcome)
        starts = np.cumsum([0, *map(len, self.captions)])
        blocks = []
        for item in shown_queries(2.0 - hits, num_queries=num_queries):
            texts = outcome.other_embeddings[starts[item] : starts[item + 1]]
            scores = cosine_scores(outcome.media_embeddings[item : item + 1], texts)[0].tolist()
            label = scored_captions(self.captions[item], scores)
            kind = "good" if hits[item] > 0.5 else "missed"
            blocks.append(card(views.of(item), label, kind=kind))
        return html.Section(self.name, [cards(blocks)], note=self.description())

    def _hits(self, outcome: Outcome) -> np.ndarray:
        """Returns the score of each item, [Q]; items of a group share the group's score."""
        if self.groups is None:
            return outcome.result.hits["caption_accuracy"]
        hits = np.ones(len(self.captions))
        for indices, hit in zip(self.groups, outcome.result.hits["group_score"], strict=True):
            hits[indices] = hit
        return hits
