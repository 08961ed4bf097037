"""Zero-shot classification of media items that may belong to several classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import classes_of, read_texts
from eval.prompts.class_prompts import (
    ClassPrompts,
    index_of_classes,
    read_class_names,
    read_prompts,
)
from eval.tasks.task import ClassificationSection, Outcome, Task

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.metrics.intervals import Bootstrap
    from eval.metrics.multi_label import MultiLabelResult
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings


class MultiLabelSection(ClassificationSection):
    """Ranks all items for each class; an item may belong to several classes.

    Samples carry "class_names" in .json, or one number per class, 0 or 1, in .npy.
    """

    task: Literal["multi_label_classification"]
    # As for zero_shot_classification
    class_names: list[str] | str | None = None
    prompt_templates: list[str] | str | None = None
    class_prompts: Path | None = None


@dataclass(frozen=True)
class MultiLabelTask(Task, section=MultiLabelSection):
    """Zero-shot classification with several classes per item."""

    class_names: list[str]  # [K]
    prompts: ClassPrompts
    is_of_class: np.ndarray  # bool [Q, K]

    dataset_types = ("multilabel",)
    main_metrics = ("mean_average_precision",)
    conditions = ("class_names", "prompts_sha256")

    @classmethod
    def read(
        cls,
        name: str,
        section: MultiLabelSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> MultiLabelTask:
        class_names = read_class_names(name, section, dataset)
        prompts = read_prompts(name, section, dataset, class_names)
        index_of = index_of_classes(class_names, dataset)
        keys, rows = [], []
        for sample in read_texts(dataset):
            keys.append(sample.key)
            rows.append(classes_of(sample, class_names=class_names, index_of=index_of))
        is_of_class = np.stack(rows)
        if not is_of_class.any():
            raise InputError(
                f"evaluations.{name}: {dataset.folder}: expected samples with classes, found none"
            )
        items = section.items_of(dataset, keys)
        return cls(name, dataset, keys, class_names, prompts, is_of_class, items=items)

    @property
    def texts(self) -> list[str]:
        return self.prompts.texts

    def method(self) -> str:
        return "multi-label classification"

    def details(self) -> str:
        return (
            f"{len(self.class_names)} classes, {self.is_of_class.sum(axis=1).mean():.2f} "
            f"per item, {len(self.prompts.templates) or 'no'} templates"
        )

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[MultiLabelResult, Tensor]:
        """Returns the result and the class embeddings, [K, D]."""
        from eval.metrics.multi_label import classify_labels

        class_embeddings = self.prompts.class_embeddings(embeddings.texts(self))
        result = classify_labels(media, class_embeddings, is_of_class=self.is_of_class)
        return result, class_embeddings

    def record(self, outcome: Outcome) -> dict[str, Any]:
        precisions = outcome.result.average_precisions.tolist()
        by_class = zip(self.class_names, precisions, strict=True)
        return {
            "num_queries": len(self.is_of_class),
            "num_classes": len(self.class_names),
            "num_classes_without_items": sum(map(math.isnan, precisions)),
            "mean": "over the classes that have items",
            "num_labels": int(self.is_of_class.sum()),
            "class_names": self.class_names,
            **self.prompts.record(),
            "average_precisions": {
                name: None if math.isnan(value) else value for name, value in by_class
            },
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        from eval.metrics.ranking import cosine_scores

        scores = cosine_scores(outcome.media_embeddings, outcome.other_embeddings)  # [Q, K]
        class_names = [
            [self.class_names[index] for index in row.nonzero()[0]] for row in self.is_of_class
        ]
        return {"": {"key": self.keys, "class_names": class_names, "scores": list(scores.numpy())}}

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        """Compares mean average precision over the same resamples of items."""
        from eval.metrics.multi_label import average_precisions, difference_interval

        first, second = pair.tables()
        names = pair.record["class_names"]
        of_class = np.array([[name in found for found in first["class_names"]] for name in names])
        present = of_class.any(axis=1)
        both = [
            np.array(each["scores"], dtype=np.float32).T[present]  # [K, Q]
            for each in (first, second)
        ]
        values = [average_precisions(scores, of_class[present]) for scores in both]
        yield pair.difference(
            "mean_average_precision",
            values=(values[0], values[1]),
            interval=difference_interval(*both, of_class[present], pair.bootstrap),
            keys=[name for name, is_here in zip(names, present, strict=True) if is_here],
        )

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Lists the average precision of every class, worst first."""
        from data_prep.report import html
        from eval.report.classes import MAX_CLASS_ROWS

        precisions, num_items = outcome.result.average_precisions, self.is_of_class.sum(axis=0)
        rows = [
            (
                self.class_names[index],
                f"{100 * precisions[index]:.1f} %",
                f"{100 * num_items[index] / len(self.is_of_class):.1f} %",
                str(num_items[index]),
            )
            for index in np.argsort(precisions, kind="stable").tolist()
            if num_items[index]
        ]
        header = ("class", "average precision", "fraction of items", "n")
        blocks = [
            html.heading("Average precision per class, worst first"),
            html.table(header, rows[:MAX_CLASS_ROWS], numeric={1, 2, 3}),
        ]
        return html.Section(self.name, blocks, note=self.description())
