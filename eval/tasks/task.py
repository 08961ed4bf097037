"""The interface of an evaluation task, and the registry of all tasks.

A task is one module of this folder with two classes: the section of its config, and the task.

    EvaluationSection    settings, under `evaluations` in the config
    Task                 read -> measure -> record, predictions, differences, report_section

Everything else in eval calls these methods and knows no task by name, so a new benchmark is a new
module and nothing else. Modules of tasks import torch, pyarrow and the report inside their methods:
a dry run or a config error needs none of them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, get_args

from pydantic import PositiveInt

from data_prep.config_file import Section
from eval.datasets.columns import DatasetLocation, TableColumns

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.datasets.datasets import EvaluationSet, EvaluationSets
    from eval.metrics.embedding_space import EmbeddingSpace
    from eval.metrics.intervals import Bootstrap, Score
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings

_TASKS: dict[str, type[Task]] = {}  # by the `task` of the config


class EvaluationSection(Section):
    """The settings that all evaluations share; each task adds `task: Literal["its_name"]`."""

    renamed: ClassVar[dict[str, str]] = {"main_figure": "main_metric"}

    dataset: DatasetLocation
    split: str = "test"  # of tars or class folders that have several
    subset: Path | None = None  # .subset file of Isopair shards: measure only the samples it keeps
    columns: TableColumns = TableColumns()
    # Metric -> least value (of ranks: largest); the command fails if one is missed
    goals: dict[str, float] = {}
    expected_items: PositiveInt | None = None  # a dataset of another size is refused
    how_to_get: str | None = None  # advice in the message for a missing dataset
    main_metric: str | None = None  # metric that averages take; null: the main one of its task
    averages: list[str] = []  # averages that include this evaluation, in addition to "all"

    def locations(self) -> list[tuple[str, str]]:
        """Returns (location, split) of every dataset that the evaluation reads."""
        return [(self.dataset, self.split)]


@dataclass(frozen=True)
class MediaSet:
    """Media items that a task needs the embeddings of."""

    dataset: EvaluationSet
    keys: list[str]  # [Q] keys of the samples


class Result(Protocol):
    """The result of a measurement; most tasks add fields of their own."""

    scores: dict[str, Score]


@dataclass(frozen=True)
class Task(ABC):
    """One evaluation of a config, with all its inputs except the embeddings.

    A subclass names its config section, `class ToyTask(Task, section=ToySection)`, and is thereby
    registered under the section's `task`.
    """

    name: str  # of the evaluation
    dataset: EvaluationSet
    keys: list[str]  # [Q] keys of the samples

    section_type: ClassVar[type[EvaluationSection]]
    task_name: ClassVar[str]  # the `task` of the config
    # Values of dataset_type.txt next to published tars that suit the task; empty: any
    dataset_types: ClassVar[tuple[str, ...]] = ()
    # Metrics that averages take: the first that the result has
    main_metrics: ClassVar[tuple[str, ...]] = ()
    # Keys of the record that must be equal for two results to be comparable
    conditions: ClassVar[tuple[str, ...]] = ()
    # Whether the report shows queries of the task: the tasks that do share the space of a page
    shows_queries: ClassVar[bool] = True

    def __init_subclass__(
        cls, *, section: type[EvaluationSection] | None = None, **options: Any
    ) -> None:
        super().__init_subclass__(**options)
        if section is not None:
            (cls.task_name,) = get_args(section.model_fields["task"].annotation)
            cls.section_type = section
            _TASKS[cls.task_name] = cls

    # ------------------------------------------------------------------------------ reading

    @classmethod
    @abstractmethod
    def read(
        cls, name: str, section: Any, dataset: EvaluationSet, *, sets: EvaluationSets, seed: int
    ) -> Self:
        """Reads and checks samples, labels and texts.

        Args:
            name: name of the evaluation.
            section: its config, of the type `section_type`.
            dataset: the dataset that the config names.
            sets: opens further datasets, each once.
            seed: seed of whatever the task draws.

        Raises:
            InputError: if a sample lacks what the task needs.
        """

    @property
    def media_sets(self) -> list[MediaSet]:
        """All media to encode; the first set is the one that is measured."""
        return [MediaSet(self.dataset, self.keys)]

    @property
    def texts(self) -> list[str]:
        """All texts to encode."""
        return []

    @property
    def text_name(self) -> str:
        """A name for the texts, for messages."""
        return f"prompts of {self.name}"

    def description(self) -> str:
        """Describes in one line what is measured."""
        return (
            f"{self.name}: {self.method()}, {len(self.dataset)} {self.dataset.info.media} items, "
            f"{self.details()} ({self.dataset.folder})"
        )

    @abstractmethod
    def method(self) -> str:
        """Returns the task in words."""

    @abstractmethod
    def details(self) -> str:
        """Returns the counts of classes, captions and the like in words."""

    # ---------------------------------------------------------------------------- measuring

    @abstractmethod
    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[Result, Tensor]:
        """Measures the task.

        Args:
            media: [Q, D] embeddings of the first media set, L2-normalised.
            embeddings: gives all other embeddings.
            bootstrap: settings of the intervals.

        Returns:
            The result, and the embeddings that media are compared with, which the predictions and
            the report use.
        """

    def embedding_space(self, media: Tensor, other: Tensor) -> EmbeddingSpace | None:
        """Describes the space that both kinds of embeddings share; None for most tasks.

        Args:
            media: [Q, D] as for `measure`, on the CPU.
            other: the embeddings that `measure` returned, on the CPU.
        """
        return None

    # ---------------------------------------------------------------------------- reporting

    def main_metric(self, scores: Mapping[str, Score]) -> str | None:
        """Returns the metric that averages take; None if there is none."""
        return next((name for name in self.main_metrics if name in scores), None)

    def notes(self) -> list[str]:
        """Returns remarks for the foot of a table of the metrics."""
        return []

    def record(self, outcome: Outcome) -> dict[str, Any]:
        """Returns what results.json holds in addition to dataset and scores."""
        return {}

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        """Returns {suffix of the file's name: {column: values}}, a row per sample or query."""
        return {}

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        """Compares two results sample by sample, from their records and predictions alone."""
        yield from ()

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Builds the task's part of the report.

        Args:
            outcome: outcome of this task.
            num_queries: number of queries that the report may show.
        """
        from data_prep.report import html

        return html.Section(self.name, [], note=self.description())


@dataclass(frozen=True)
class Outcome:
    """A task, its result, and the embeddings that the report shows neighbours from."""

    task: Task
    result: Result
    media_embeddings: Tensor  # [Q, D], L2-normalised
    other_embeddings: Tensor  # [..., D], what `Task.measure` returned
    space: EmbeddingSpace | None
    seconds: float  # without encoding


# ----------------------------------------------------------------------------------- registry


def task_types() -> dict[str, type[Task]]:
    """Returns all tasks by name, after importing every module of this folder."""
    for module in pkgutil.iter_modules(sys.modules[__package__].__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(_TASKS)


def validate_section(values: Any) -> Any:
    """Validates the config of one evaluation by the section of its task.

    Raises:
        ValueError: if `task` names no known task.
    """
    if not isinstance(values, dict):
        return values  # pydantic accepts a section, and describes what else it found
    known, name = task_types(), values.get("task")
    if name not in list(known):
        raise ValueError(f"task: expected one of {', '.join(sorted(known))}; found {name!r}")
    return known[name].section_type.model_validate(values)
