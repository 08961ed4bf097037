"""Base classes of single-label classification tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.sample import Sample
from eval.datasets.columns import DatasetLocation
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import class_index_of, read_texts
from eval.datasets.views import samples_having
from eval.embeddings.items import ItemSet, MediaSet
from eval.prompts.class_prompts import index_of_classes, read_class_names
from eval.tasks.task import ClassificationSection, Outcome, Task

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings

TRAIN_ADVICE = "set train, train_split, or a subset and a train_subset without common samples"
OBJECTIVE = "mean cross-entropy + l2 * |W|^2 / (2 n)"  # minimised by linear probes


@dataclass(frozen=True)
class SingleLabelTask(Task):
    """Classification of a dataset whose media items each have one class."""

    class_names: list[str]  # [K]
    targets: np.ndarray  # int64 [Q], index into class_names

    main_metrics = ("top_1_accuracy",)
    dataset_types = ("classification",)
    conditions = ("class_names",)
    shows_queries = False

    @cached_property
    def class_labels(self) -> list[str]:
        """[K] class names, with the index appended to duplicate names."""
        counts = Counter(self.class_names)
        return [
            f"{name} ({index})" if counts[name] > 1 else name
            for index, name in enumerate(self.class_names)
        ]

    def target_labels(self) -> list[str]:
        """Returns the class label of each item, [Q]."""
        return [self.class_labels[index] for index in self.targets]

    def details(self) -> str:
        return f"{len(self.class_names)} classes"

    def record(self, outcome: Outcome) -> dict[str, Any]:
        result = outcome.result
        recalls = zip(self.class_labels, result.class_recalls.tolist(), strict=True)
        return {
            "num_queries": len(self.targets),
            "num_classes": len(self.class_names),
            "num_classes_without_items": int(sum(math.isnan(r) for r in result.class_recalls)),
            "class_names": self.class_names,
            "class_recalls": {name: None if math.isnan(r) else r for name, r in recalls},
            "confusion_matrix": result.confusion.tolist(),
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        result = outcome.result
        return {
            "": {
                "key": self.keys,
                "class_name": self.target_labels(),
                "predicted": [
                    self.class_labels[index] if index >= 0 else None for index in result.predictions
                ],
                "hit@1": result.ranks.hits_at(1),
                "rank": result.ranks.first_ranks(),
            }
        }

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        yield from pair.mean_differences({"hit@1": "top_1_accuracy"})

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        from data_prep.report import html
        from eval.report.classes import class_blocks

        blocks = class_blocks(
            self.media_sets[0],
            outcome.result,
            class_labels=self.class_labels,
            targets=self.targets,
        )
        return html.Section(self.name, blocks, note=self.report_note(outcome))


def read_targets(
    samples: Iterable[Sample],
    dataset: EvaluationSet,
    class_names: list[str],
    *,
    label: str | None,
) -> tuple[list[str], np.ndarray]:
    """Reads the class of every sample.

    Args:
        samples: samples without their media.
        dataset: dataset of the samples.
        class_names: [K]
        label: see `SingleLabelSection`.

    Returns:
        The [Q] keys, and the index of each sample's class in class_names, int64 [Q].

    Raises:
        InputError: see `class_index_of`.
    """
    index_of = index_of_classes(class_names, dataset)
    keys, targets = [], []
    for sample in samples:
        keys.append(sample.key)
        targets.append(
            class_index_of(sample, class_names=class_names, index_of=index_of, label=label)
        )
    return keys, np.array(targets)


# ---------------------------------------------------------------------- training on labelled items


class SingleLabelSection(ClassificationSection):
    """Settings shared by all classifications with one class per item."""

    # Label of the samples, or other key in .json, with the class name; null: class_name, or .cls
    label: str | None = None


class TrainedSection(SingleLabelSection):
    """Settings shared by all tasks that train on labelled items."""

    # A list, or a text file with one name per line, or "open_clip:imagenet"; null: the file that
    # comes with the tars, or the names of the folders
    class_names: list[str] | str | None = None
    # Dataset of the training items; null: the train_split of `dataset`
    train: DatasetLocation | None = None
    train_split: str = "train"
    train_subset: Path | None = None

    def locations(self) -> list[tuple[str, str]]:
        train = [] if self.train is None else [(self.train, self.train_split)]
        return super().locations() + train


@dataclass(frozen=True)
class LabelledItems:
    """A selection of a dataset's items, with their classes."""

    source: ItemSet
    indices: np.ndarray  # int64 [n] items of the source
    targets: np.ndarray  # int64 [n], index into class_names


@dataclass(frozen=True)
class TrainedTask(SingleLabelTask):
    """Classification trained on labelled items."""

    train: LabelledItems

    conditions = ("class_names", "train_fingerprint")

    @property
    def media_sets(self) -> list[ItemSet]:
        return [*super().media_sets, self.train.source]

    def details(self) -> str:
        return f"{super().details()}, {len(self.train.indices)} training items"

    @property
    def learned_items(self) -> list[LabelledItems]:
        """All items that the classifier learns from."""
        return [self.train]

    @property
    def disjoint_sets(self) -> list[EvaluationSet]:
        learned = {
            id(each): each for each in (items.source.dataset for items in self.learned_items)
        }
        return [self.dataset, *learned.values()]

    def audit(self, media: Tensor, embeddings: Embeddings) -> dict[str, int]:
        """Counts the items with identical media files on both sides."""
        from eval.embeddings.equal_media import EmbeddedItems, equal_media

        test = EmbeddedItems(self.media_sets[0], range(len(self.keys)), media)
        is_learned, num_learned = np.zeros(len(self.keys), dtype=bool), 0
        for items in self.learned_items:
            vectors, _ = embeddings.labelled_media(items)
            learned = EmbeddedItems(items.source, items.indices, vectors)
            of_test, of_learned = equal_media(test, learned)
            is_learned[of_test] = True
            num_learned += len(of_learned)
        return {
            "num_train_equal_to_test": num_learned,
            "num_test_equal_to_train": int(is_learned.sum()),
        }

    def notes(self, outcome: Outcome) -> list[str]:
        num_test = outcome.counts["num_test_equal_to_train"]
        if not num_test:
            return super().notes(outcome)
        return [
            *super().notes(outcome),
            f"{num_test} of {len(self.keys)} test items have the same media file as one of "
            f"{outcome.counts['num_train_equal_to_test']} training items, which raises the "
            "metrics.",
        ]

    def train_record(self) -> dict[str, Any]:
        """Returns the fields of results.json that describe the training items."""
        return {
            "features": "the embeddings, L2-normalised",
            "num_train": len(self.train.indices),
            "train_fingerprint": self.train.source.dataset.fingerprint,
        }


def read_trained(
    name: str, section: TrainedSection, dataset: EvaluationSet, sets: EvaluationSets
) -> dict[str, Any]:
    """Reads the fields of a `TrainedTask`: the classes of its test and training items.

    Raises:
        InputError: if a sample has no known class, or training and test items are the same dataset.
    """
    class_names = read_class_names(name, section, dataset)
    keys, targets = read_targets(read_texts(dataset), dataset, class_names, label=section.label)
    source = sets.open(
        section.train or section.dataset,
        split=section.train_split,
        subset=section.train_subset,
        columns=section.columns,
    )
    source = samples_having(source, section.views_of(source))
    check_disjoint(name, ("training", source), ("test", dataset), advice=TRAIN_ADVICE)
    return {
        "name": name,
        "dataset": dataset,
        "keys": keys,
        "class_names": class_names,
        "targets": targets,
        "train": read_labelled_items(source, class_names, section),
        "items": section.items_of(dataset, keys),
    }


def check_disjoint(
    name: str, first: tuple[str, EvaluationSet], second: tuple[str, EvaluationSet], *, advice: str
) -> None:
    """Checks that no item of one set is also an item of the other.

    Items are the same if they are the same file, the same member of a tar, or the same ordinal of
    equal Isopair shards. `Task.disjoint_sets` compares the contents of whole datasets.

    Args:
        name: name of the evaluation.
        first: role and items, such as ("training", items).
        second: role and items.
        advice: keys that the message asks to set.

    Raises:
        InputError: if the sets have an item in common.
    """
    (role, items), (other_role, other_items) = first, second
    known = set(other_items.identities())
    num_shared = sum(identity in known for identity in items.identities())
    if num_shared:
        raise InputError(
            f"evaluations.{name}: {items.folder}: expected {role} items other than the "
            f"{other_role} items, found {num_shared} of {len(items)} {role} items among the "
            f"{other_role} items of {other_items.folder}; {advice}"
        )


def read_labelled_items(
    source: EvaluationSet, class_names: list[str], section: SingleLabelSection
) -> LabelledItems:
    """Reads the classes of all items of a dataset.

    Args:
        source: samples that have the section's views.
        class_names: [K]
        section: section of the evaluation.

    Raises:
        InputError: see `class_index_of`.
    """
    keys, targets = read_targets(read_texts(source), source, class_names, label=section.label)
    items = section.items_of(source, keys) or MediaSet(source, keys)
    return LabelledItems(items, np.arange(len(keys)), targets)
