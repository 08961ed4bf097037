"""Few-shot classification: linear probes trained on a few items per class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.tasks.single_label import OBJECTIVE, TrainedSection, TrainedTask, read_trained
from eval.tasks.task import Outcome, Task

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.metrics.few_shot import FewShotResult
    from eval.metrics.intervals import Bootstrap, Score
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings


class FewShotSection(TrainedSection):
    """Fits linear probes to a few training items per class, over several random draws.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    renamed: ClassVar[dict[str, str]] = {"strength": "l2"}

    task: Literal["few_shot"]
    shots: list[PositiveInt] = Field(default=[1, 2, 4, 8, 16], min_length=1)  # items per class
    num_draws: PositiveInt = 3
    l2: PositiveFloat = 1 / 0.316  # weight of the L2 penalty, 1 / C


@dataclass(frozen=True)
class FewShotTask(TrainedTask, section=FewShotSection):
    """Classification by linear probes trained on a few items per class."""

    shots: list[int]
    num_draws: int
    l2: float  # weight of the L2 penalty
    seed: int

    conditions = ("class_names", "train_fingerprint", "l2", "shots", "num_draws", "seed")

    @classmethod
    def read(
        cls,
        name: str,
        section: FewShotSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> FewShotTask:
        fields = read_trained(name, section, dataset, sets)
        class_names, train = fields["class_names"], fields["train"]
        counts = np.bincount(train.targets, minlength=len(class_names))
        if counts.min() < max(section.shots):
            raise InputError(
                f"evaluations.{name}: {train.source.dataset.folder}: expected at least "
                f"{max(section.shots)} training items of each class (shots), found {counts.min()} "
                f"of {class_names[int(counts.argmin())]!r}"
            )
        return cls(
            **fields,
            shots=sorted(section.shots),
            num_draws=section.num_draws,
            l2=section.l2,
            seed=seed,
        )

    def method(self) -> str:
        return f"few-shot probes, {self.shots} shots, {self.num_draws} draws"

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[FewShotResult, Tensor]:
        """Returns the result and the embeddings of the training items, [n, D]."""
        from eval.metrics.few_shot import classify_from_few

        train = embeddings.labelled_media(self.train)
        result = classify_from_few(
            media,
            train,
            targets=self.targets,
            num_classes=len(self.class_names),
            shots=self.shots,
            num_draws=self.num_draws,
            l2=self.l2,
            seed=self.seed,
        )
        return result, train[0]

    def main_metric(self, scores: Mapping[str, Score]) -> str | None:
        """Returns the accuracy with the largest number of shots."""
        return [name for name in scores if name.endswith("_shot")][-1]

    def record(self, outcome: Outcome) -> dict[str, Any]:
        return {
            "num_queries": len(self.targets),
            "num_classes": len(self.class_names),
            "class_names": self.class_names,
            **self.train_record(),
            "objective": OBJECTIVE,
            "l2": self.l2,
            "shots": self.shots,
            "num_draws": self.num_draws,
            "seed": self.seed,
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        hits = {f"hit@1_{shots}_shot": hits for shots, hits in outcome.result.hits.items()}
        return {"": {"key": self.keys, "class_name": self.target_labels(), **hits}}

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        shots = pair.record["shots"]
        yield from pair.mean_differences(
            {f"hit@1_{k}_shot": f"top_1_accuracy@{k}_shot" for k in shots}
        )

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        return Task.report_section(self, outcome, num_queries=num_queries)  # no confusion matrix
