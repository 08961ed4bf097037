"""What an evaluation measures: samples, labels, class names, captions, all read and checked by
eval.task_readers. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from data_prep.subset import KeptSamples
from eval.class_prompts import class_prompts
from eval.right_pairs import RightPairs, pairs_of_equal_captions, pairs_of_owners
from eval.tar_dataset import TarDataset

EvaluationSet = KeptSamples | TarDataset


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


@dataclass(frozen=True)
class ClassificationTask(_Task):
    """Zero-shot classification of the media items of a dataset."""

    class_names: list[str]  # [K]
    prompt_templates: list[str]
    targets: np.ndarray  # [Q] int64, place in class_names

    @property
    def texts(self) -> list[str]:
        """The prompts: all of the first class, then all of the second, and so on."""
        return class_prompts(self.class_names, self.prompt_templates)

    def description(self) -> str:
        num_prompts = len(self.class_names) * len(self.prompt_templates)
        return (
            f"{self.name}: zero-shot classification, {len(self.dataset)} {self.dataset.info.media} "
            f"items, {len(self.class_names)} classes, {len(self.prompt_templates)} templates, "
            f"{num_prompts} prompts ({self.dataset.folder})"
        )


@dataclass(frozen=True)
class LabelledItems:
    """Some items of a dataset, with their classes."""

    source: MediaSet
    places: np.ndarray  # int64 [n] of the items in the source
    targets: np.ndarray  # int64 [n], place in class_names


@dataclass(frozen=True)
class LinearProbeTask(ClassificationTask):
    """Classification by a regression on embeddings; it has no prompts."""

    train: LabelledItems
    validation: LabelledItems
    strength: float | None  # of the regularisation; None: chosen on validation items

    @property
    def media_sets(self) -> list[MediaSet]:
        return [*super().media_sets, self.train.source, self.validation.source]

    @property
    def texts(self) -> list[str]:
        return []

    def description(self) -> str:
        return (
            f"{self.name}: linear probe, {len(self.dataset)} {self.dataset.info.media} items, "
            f"{len(self.class_names)} classes, {len(self.train.places)} items to train on and "
            f"{len(self.validation.places)} to validate ({self.dataset.folder})"
        )


@dataclass(frozen=True)
class MultiLabelTask(_Task):
    """Zero-shot classification of media items that may be of several classes."""

    class_names: list[str]  # [K]
    prompt_templates: list[str]
    is_of_class: np.ndarray  # bool [Q, K]

    @property
    def texts(self) -> list[str]:
        """The prompts, class by class."""
        return class_prompts(self.class_names, self.prompt_templates)

    def description(self) -> str:
        return (
            f"{self.name}: multi-label classification, {len(self.dataset)} "
            f"{self.dataset.info.media} items, {len(self.class_names)} classes, "
            f"{self.is_of_class.sum(axis=1).mean():.2f} of them per item, "
            f"{len(self.prompt_templates)} templates ({self.dataset.folder})"
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
    def pairs(self) -> RightPairs:
        """Which captions are right for which items."""
        if self.merges_equal_captions:
            return pairs_of_equal_captions(self.media_of_text, self.captions)
        return pairs_of_owners(self.media_of_text)

    def description(self) -> str:
        return (
            f"{self.name}: retrieval, {len(self.dataset)} {self.dataset.info.media} items, "
            f"{len(self.captions)} captions, {len(self.distractor_captions)} distractor captions, "
            f"k {self.ks}{', equal captions merged' if self.merges_equal_captions else ''} "
            f"({self.dataset.folder})"
        )


Task = ClassificationTask | LinearProbeTask | MultiLabelTask | RetrievalTask
