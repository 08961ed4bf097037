"""What an evaluation measures: samples, labels, class names, captions, all read and checked by
eval.tasks.readers. Needs no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from eval.datasets.datasets import EvaluationSet
from eval.metrics.relevance import Relevance, relevance_of_equal_captions, relevance_of_owners


@dataclass(frozen=True)
class MediaSet:
    """Media items that a task needs the embeddings of."""

    dataset: EvaluationSet
    keys: list[str]  # [Q] of its samples


@dataclass(frozen=True)
class _Task:
    """What all tasks have."""

    name: str
    dataset: EvaluationSet
    keys: list[str]  # [Q] of the samples

    @property
    def media_sets(self) -> list[MediaSet]:
        """Everything to encode, besides texts."""
        return [MediaSet(self.dataset, self.keys)]

    @property
    def texts(self) -> list[str]:
        """Every text to encode."""
        return []

    @property
    def text_name(self) -> str:
        """What the texts are, for messages."""
        return f"prompts of {self.name}"

    def description(self) -> str:
        """What is measured, in a line."""
        return (
            f"{self.name}: {self.method()}, {len(self.dataset)} {self.dataset.info.media} items, "
            f"{self.details()} ({self.dataset.folder})"
        )

    def method(self) -> str:
        """The task in words."""
        raise NotImplementedError

    def details(self) -> str:
        """Its counts in words."""
        raise NotImplementedError


@dataclass(frozen=True)
class SingleLabelTask(_Task):
    """Classification of the media items of a dataset, each of one class."""

    class_names: list[str]  # [K]
    targets: np.ndarray  # int64 [Q], place in class_names

    @cached_property
    def class_labels(self) -> list[str]:
        """[K] the names, with the place of those that stand twice."""
        counts = Counter(self.class_names)
        return [
            f"{name} ({place})" if counts[name] > 1 else name
            for place, name in enumerate(self.class_names)
        ]

    def details(self) -> str:
        return f"{len(self.class_names)} classes"


@dataclass(frozen=True)
class ClassificationTask(SingleLabelTask):
    """Zero-shot classification."""

    prompt_templates: list[str]  # none where the classes have prompts of their own
    prompts: list[list[str]]  # [K] of each class
    groups: list[str] | None = None  # [Q] of which the worst one's accuracy is measured as well

    @property
    def texts(self) -> list[str]:
        """The prompts: all of the first class, then all of the second, and so on."""
        return list(chain.from_iterable(self.prompts))

    def method(self) -> str:
        return "zero-shot classification"

    def details(self) -> str:
        groups = "" if self.groups is None else f", {len(set(self.groups))} groups"
        return (
            f"{super().details()}, {len(self.prompt_templates) or 'no'} templates, "
            f"{len(self.texts)} prompts{groups}"
        )


@dataclass(frozen=True)
class LabelledItems:
    """Some items of a dataset, with their classes."""

    source: MediaSet
    indices: np.ndarray  # int64 [n] of the items in the source
    targets: np.ndarray  # int64 [n], place in class_names


@dataclass(frozen=True)
class TrainedTask(SingleLabelTask):
    """Classification that learns from labelled items."""

    train: LabelledItems

    @property
    def media_sets(self) -> list[MediaSet]:
        return [*super().media_sets, self.train.source]

    def details(self) -> str:
        return f"{super().details()}, {len(self.train.indices)} items to train on"


@dataclass(frozen=True)
class LinearProbeTask(TrainedTask):
    """By a regression on embeddings."""

    validation: LabelledItems
    l2: float | None  # weight of the L2 penalty; None: chosen on validation items

    @property
    def media_sets(self) -> list[MediaSet]:
        return [*super().media_sets, self.validation.source]

    def method(self) -> str:
        return "linear probe"

    def details(self) -> str:
        return f"{super().details()} and {len(self.validation.indices)} to validate"


@dataclass(frozen=True)
class NearestNeighboursTask(TrainedTask):
    """By the votes of the nearest training items."""

    num_neighbours: int
    temperature: float

    def method(self) -> str:
        return f"{self.num_neighbours} nearest neighbours"


@dataclass(frozen=True)
class FewShotTask(TrainedTask):
    """By regressions on a few training items of each class."""

    shots: list[int]
    num_draws: int
    l2: float  # weight of the L2 penalty
    seed: int

    def method(self) -> str:
        return f"few-shot probes, {self.shots} shots, {self.num_draws} draws"


@dataclass(frozen=True)
class MultiLabelTask(_Task):
    """Zero-shot classification of media items that may be of several classes."""

    class_names: list[str]  # [K]
    prompt_templates: list[str]  # as of ClassificationTask
    prompts: list[list[str]]
    is_of_class: np.ndarray  # bool [Q, K]

    @property
    def texts(self) -> list[str]:
        """The prompts, class by class."""
        return list(chain.from_iterable(self.prompts))

    def method(self) -> str:
        return "multi-label classification"

    def details(self) -> str:
        return (
            f"{len(self.class_names)} classes, {self.is_of_class.sum(axis=1).mean():.2f} of them "
            f"per item, {len(self.prompt_templates) or 'no'} templates"
        )


@dataclass(frozen=True)
class RetrievalTask(_Task):
    """Retrieval in both directions between the media items and the captions of a dataset."""

    captions: list[str]  # [M]
    media_of_text: np.ndarray  # [M] int64: caption m describes media item media_of_text[m]
    distractor_captions: list[str]  # describe no item; in the gallery of media to text only
    ks: list[int]
    merges_equal_captions: bool = False  # each is right for all items that have its words

    @property
    def texts(self) -> list[str]:
        """The captions, then the distractors."""
        return self.captions + self.distractor_captions

    @property
    def text_name(self) -> str:
        return f"captions of {self.name}"

    @cached_property
    def relevance(self) -> Relevance:
        """Which captions are right for which items."""
        if self.merges_equal_captions:
            return relevance_of_equal_captions(self.media_of_text, self.captions)
        return relevance_of_owners(self.media_of_text)

    def method(self) -> str:
        return "retrieval"

    def details(self) -> str:
        return (
            f"{len(self.captions)} captions, {len(self.distractor_captions)} distractor captions, "
            f"k {self.ks}{', equal captions merged' if self.merges_equal_captions else ''}"
        )


@dataclass(frozen=True)
class MediaRetrievalTask(_Task):
    """Retrieval in both directions between the media items of two datasets."""

    other: MediaSet  # M items
    relevance: Relevance  # "texts" are the other's items
    ks: list[int]

    @property
    def media_sets(self) -> list[MediaSet]:
        return [*super().media_sets, self.other]

    @property
    def directions(self) -> tuple[str, str]:
        """What metrics are called by."""
        kind, other = self.dataset.info.media, self.other.dataset.info.media
        return f"{kind}_to_{other}", f"{other}_to_{kind}"

    def method(self) -> str:
        return "media retrieval"

    def details(self) -> str:
        other = self.other.dataset
        return f"{len(other)} {other.info.media} items of {other.folder}, k {self.ks}"


@dataclass(frozen=True)
class CaptionChoiceTask(_Task):
    """Choice of the right caption, or media item, among a few that are nearly alike."""

    captions: list[list[str]]  # [Q] of each item, the right one first
    groups: list[list[int]] | None  # indices of items that are each other's wrong answers

    @property
    def texts(self) -> list[str]:
        """The captions of the first item, then of the second, and so on."""
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


@dataclass(frozen=True)
class AssociationTask(_Task):
    """Choice of the media items that belong to a cue, among a few."""

    groups: dict[str, list[int]]  # indices of the items to choose from, by the name of the group
    cues: list[str]  # [groups]
    is_right: np.ndarray  # bool [Q]

    @property
    def texts(self) -> list[str]:
        """The cues."""
        return self.cues

    @property
    def text_name(self) -> str:
        return f"cues of {self.name}"

    def method(self) -> str:
        return "association"

    def details(self) -> str:
        return f"{len(self.groups)} cues, {int(self.is_right.sum())} items that belong to theirs"


Task = (
    ClassificationTask
    | LinearProbeTask
    | NearestNeighboursTask
    | FewShotTask
    | MultiLabelTask
    | RetrievalTask
    | MediaRetrievalTask
    | CaptionChoiceTask
    | AssociationTask
)
