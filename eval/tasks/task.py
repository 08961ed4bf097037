"""The interface of an evaluation task, and the registry of all tasks.

A task is one module of this folder with two classes, its config section and the task itself:

    EvaluationSection    settings, under `evaluations` in the config
    Task                 read -> measure -> record, predictions, differences, report_section

The rest of eval only calls these methods and mentions no task by name, so a new benchmark needs
nothing but a new module. Task modules import torch, pyarrow and the report inside their methods,
because a dry run or a config error needs none of them.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Protocol, Self, get_args

from pydantic import BeforeValidator, Field, PositiveInt, field_validator

from data_prep.config_file import Section
from eval.datasets.columns import DatasetLocation, EvaluatedView, TableColumns

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.datasets.datasets import EvaluationSet, EvaluationSets
    from eval.embeddings.items import ItemSet
    from eval.metrics.embedding_space import EmbeddingSpace
    from eval.metrics.intervals import Bootstrap, Score
    from eval.models.encoder import Encoder
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings

_TASKS: dict[str, type[Task]] = {}  # `task` key of the config -> task


class EvaluationSection(Section):
    """Settings shared by all evaluations; each task adds `task: Literal["its_name"]`."""

    renamed: ClassVar[dict[str, str]] = {"main_figure": "main_metric"}

    dataset: DatasetLocation
    split: str = "test"  # split to read from tars or class folders that have several
    subset: Path | None = None  # .subset file of Isopair shards; only its samples are measured
    columns: TableColumns = TableColumns()
    # Metric -> lowest accepted value (highest for ranks); the command fails if a goal is missed
    goals: dict[str, float] = {}
    expected_items: PositiveInt | None = None  # the dataset must have exactly this many items
    how_to_get: str | None = None  # shown in the error message if the dataset is missing
    main_metric: str | None = None  # metric used in averages; null: the task's main metric
    averages: list[str] = []  # averages that include this evaluation, in addition to "all"

    @field_validator("main_metric")
    @classmethod
    def _check_main_metric(cls, main_metric: str | None) -> str | None:
        if main_metric is not None and main_metric.endswith("_rank"):
            raise ValueError(
                f"expected a metric from 0 to 1, which can be averaged with others, found the rank "
                f"{main_metric}; use a recall, such as mean_recall@1"
            )
        if main_metric in ("cider", "token_loss"):
            raise ValueError(
                "expected a metric from 0 to 1, which can be averaged with others, found "
                f"{main_metric}; use exact_match or token_accuracy"
            )
        return main_metric

    def locations(self) -> list[tuple[str, str]]:
        """Lists (location, split) of every dataset that the evaluation reads."""
        return [(self.dataset, self.split)]

    def views_of(self, dataset: EvaluationSet) -> list[str]:
        """Returns the views that a sample must have to take part.

        Args:
            dataset: dataset of the evaluation, or one of its training items.

        Raises:
            InputError: if the dataset has neither images nor audio, and the section names no views.
        """
        from eval.datasets.views import media_view

        return [media_view(dataset)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str | dict) else value


class ClassificationSection(EvaluationSection):
    """Settings shared by all classifications."""

    # View of a sample that is classified, such as audio, or {text: title}. A list: the mean of
    # several, whose embeddings are averaged and normalised again; the texts of a sample are
    # averaged first. null: the images or audio clips
    views: Annotated[list[EvaluatedView] | None, BeforeValidator(_as_list), Field(min_length=1)] = (
        None
    )

    @field_validator("views")
    @classmethod
    def _check_views(cls, views: list[str] | None) -> list[str] | None:
        if views is not None and len(set(views)) < len(views):
            raise ValueError(f"expected different views, found {views}")
        return views

    def views_of(self, dataset: EvaluationSet) -> list[str]:
        """Returns the views that are classified; see the base class."""
        return super().views_of(dataset) if self.views is None else self.views

    def items_of(self, dataset: EvaluationSet, keys: list[str]) -> ItemSet | None:
        """Returns the items to classify, one per sample; None for the dataset's media.

        Args:
            dataset: samples that have the views.
            keys: keys of the samples.

        Raises:
            InputError: if a text cannot be read.
        """
        from eval.embeddings.items import read_samples

        return None if self.views is None else read_samples(dataset, keys, self.views)


class CaptionedSection(EvaluationSection):
    """Settings of evaluations that need media with captions."""

    def views_of(self, dataset: EvaluationSet) -> list[str]:
        """Returns the media and the captions; see the base class."""
        return [*super().views_of(dataset), "text"]


class Result(Protocol):
    """Result of a measurement; most tasks add fields of their own."""

    scores: dict[str, Score]


@dataclass(frozen=True)
class Task(ABC):
    """One evaluation of a config, with all its inputs except the embeddings.

    A subclass declares its config section, `class ToyTask(Task, section=ToySection)`, which
    registers it under the section's `task`.
    """

    name: str  # name of the evaluation
    dataset: EvaluationSet
    keys: list[str]  # [Q] keys of the samples
    items: ItemSet | None = field(default=None, kw_only=True)  # None: the dataset's media
    # Set after reading: views that a sample must have, and number of samples that lack one
    needed_views: tuple[str, ...] = field(default=(), kw_only=True)
    num_lacking: int = field(default=0, kw_only=True)

    section_type: ClassVar[type[EvaluationSection]]
    task_name: ClassVar[str]  # value of `task` in the config
    # Values of dataset_type.txt (next to published tars) that suit the task; empty: any
    dataset_types: ClassVar[tuple[str, ...]] = ()
    # Metrics used in averages: the first one that the result contains
    main_metrics: ClassVar[tuple[str, ...]] = ()
    # Keys of the record that must be equal in comparable results
    conditions: ClassVar[tuple[str, ...]] = ()
    # Whether the metrics depend on embeddings, which are then computed, and thus on how many of
    # their numbers are measured
    measures_embeddings: ClassVar[bool] = True
    # Whether the report shows queries of the task; such tasks share the page's limit on queries
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
            section: config section of type `section_type`.
            dataset: samples of the evaluation that have the section's views.
            sets: opens further datasets.
            seed: seed of the task's random draws.

        Raises:
            InputError: if a sample lacks a label or caption that the task needs.
        """

    @property
    def media_sets(self) -> list[ItemSet]:
        """All sets of items to encode; the first one is measured."""
        from eval.embeddings.items import MediaSet

        return [self.items or MediaSet(self.dataset, self.keys)]

    @property
    def texts(self) -> list[str]:
        """All texts to encode."""
        return []

    @property
    def text_name(self) -> str:
        """Name of the texts in messages."""
        return f"prompts of {self.name}"

    def description(self) -> str:
        """Returns a one-line description of the measurement."""
        return (
            f"{self.name}: {self.method()}, {len(self.dataset)} "
            f"{' + '.join(self.media_sets[0].views)} items, {self.details()} "
            f"({self.dataset.folder})"
        )

    @abstractmethod
    def method(self) -> str:
        """Returns a short name of the method for descriptions."""

    @abstractmethod
    def details(self) -> str:
        """Returns the numbers of classes, captions and so on for descriptions."""

    @property
    def disjoint_sets(self) -> list[EvaluationSet]:
        """Datasets that must not have equal contents; empty for most tasks."""
        return []

    def for_model(self, encoder: Encoder) -> Self:
        """Returns the task for a model, with samples and texts that depend on the model.

        Raises:
            InputError: if the model cannot do what the task needs, beyond encoding its media and
                texts, or if the dataset lacks what the model needs.
        """
        return self

    # ---------------------------------------------------------------------------- measuring

    def compute(self, encoder: Encoder) -> Any:
        """Computes what the task needs in addition to embeddings; every process must call it.

        Returns:
            What `measure` finds in `Embeddings.computed`.

        Raises:
            InputError: if a sample cannot be read.
        """
        return None

    @abstractmethod
    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[Result, Tensor]:
        """Measures the task.

        Args:
            media: [Q, D] embeddings of the first media set, L2-normalised; [0, 0] if the task
                does not measure embeddings.
            embeddings: source of all other embeddings.
            bootstrap: settings of resampling; its seed is also that of random orders of ties.

        Returns:
            The result, and the embeddings that the media are compared with; predictions and report
            use them.
        """

    def audit(self, media: Tensor, embeddings: Embeddings) -> dict[str, int]:
        """Counts items that limit what the metrics mean; the record and the report show them.

        Args:
            media: [Q, D] as in `measure`.
            embeddings: source of all other embeddings.

        Returns:
            {"num_...": count}; empty for most tasks.
        """
        return {}

    def embedding_space(
        self, media: Tensor, other: Tensor, result: Result
    ) -> EmbeddingSpace | None:
        """Computes the geometry of the embedding space; None for most tasks.

        Args:
            media: [Q, D] as in `measure`, on the CPU.
            other: embeddings returned by `measure`, on the CPU.
            result: result returned by `measure`.
        """
        return None

    # ---------------------------------------------------------------------------- reporting

    def main_metric(self, scores: Mapping[str, Score]) -> str | None:
        """Returns the metric used in averages; None if there is none."""
        return next((name for name in self.main_metrics if name in scores), None)

    def row_name(self, outcome: Outcome) -> str:
        """Returns the name of the evaluation in tables of metrics."""
        return self.name

    def notes(self, outcome: Outcome) -> list[str]:
        """Returns remarks to print below the table of metrics."""
        if not self.num_lacking:
            return []
        return [
            f"{self.num_lacking} of {len(self.dataset) + self.num_lacking} samples lack "
            f"{' or '.join(self.needed_views)} and take no part."
        ]

    def record_of_items(self) -> dict[str, Any]:
        """Returns the fields of results.json that describe the views and the samples."""
        found: dict[str, Any] = {"num_lacking": self.num_lacking} if self.num_lacking else {}
        return found | ({"views": list(self.items.views)} if self.items is not None else {})

    def report_note(self, outcome: Outcome) -> str:
        """Returns the description, followed by the remarks."""
        return ". ".join([self.description(), *self.notes(outcome)])

    def record(self, outcome: Outcome) -> dict[str, Any]:
        """Returns the task's fields of results.json, in addition to dataset and scores."""
        return {}

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        """Returns {file suffix: {column: values}}, with one row per sample or query."""
        return {}

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        """Compares two results sample by sample, given only their records and predictions."""
        yield from ()

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        """Builds the task's part of the report.

        Args:
            outcome: outcome of this task.
            num_queries: number of queries that the report may show.
        """
        from data_prep.report import html

        return html.Section(self.name, [], note=self.report_note(outcome))


@dataclass(frozen=True)
class Outcome:
    """A task, its result, and the embeddings from which the report finds neighbours."""

    task: Task
    result: Result
    media_embeddings: Tensor  # [Q, D], L2-normalised
    other_embeddings: Tensor  # [..., D], returned by `Task.measure`
    space: EmbeddingSpace | None
    counts: Mapping[str, int]  # returned by `Task.audit`
    seconds: float  # duration without encoding
    # Scores on the first numbers of the embeddings, by "dim<numbers>_<metric>"
    scores_of_dims: Mapping[str, Score] = field(default_factory=dict)

    @property
    def scores(self) -> dict[str, Score]:
        """All scores; those on all numbers of the embeddings come first."""
        return {**self.result.scores, **self.scores_of_dims}


# ----------------------------------------------------------------------------------- registry


def task_types() -> dict[str, type[Task]]:
    """Returns all tasks by name, after importing every module of this folder."""
    for module in pkgutil.iter_modules(sys.modules[__package__].__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return dict(_TASKS)


def validate_section(values: Any) -> Any:
    """Validates the config of one evaluation with the section class of its task.

    Raises:
        ValueError: if `task` is not the name of a task.
    """
    if not isinstance(values, dict):
        return values  # pydantic accepts a section, and reports anything else as an error
    known, name = task_types(), values.get("task")
    if name not in list(known):
        raise ValueError(f"task: expected one of {', '.join(sorted(known))}; found {name!r}")
    return known[name].section_type.model_validate(values)
