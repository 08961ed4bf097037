"""Nearest neighbours: the training items nearest to a media item vote for its class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import PositiveFloat, PositiveInt

from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.tasks.single_label import TrainedSection, TrainedTask, read_trained
from eval.tasks.task import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from eval.metrics.intervals import Bootstrap
    from eval.metrics.zero_shot import ClassificationResult
    from eval.tasks.runner import Embeddings


class NearestNeighboursSection(TrainedSection):
    """Classifies by the votes of the training items nearest to each item (DINO's k-NN).

    Samples carry "class_name" in .json, or an index in .cls.
    """

    task: Literal["nearest_neighbours"]
    num_neighbours: PositiveInt = 20
    temperature: PositiveFloat = 0.07  # the weight of a vote is exp(cosine / temperature)


@dataclass(frozen=True)
class NearestNeighboursTask(TrainedTask, section=NearestNeighboursSection):
    """Classification by the votes of the nearest training items."""

    num_neighbours: int
    temperature: float

    conditions = ("class_names", "train_fingerprint", "num_neighbours", "temperature")

    @classmethod
    def read(
        cls,
        name: str,
        section: NearestNeighboursSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> NearestNeighboursTask:
        fields = read_trained(name, section, dataset, sets)
        return cls(**fields, num_neighbours=section.num_neighbours, temperature=section.temperature)

    def method(self) -> str:
        return f"{self.num_neighbours} nearest neighbours"

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[ClassificationResult, Tensor]:
        """Returns the result and the embeddings of the training items, [n, D]."""
        from eval.metrics.knn import neighbour_votes
        from eval.metrics.zero_shot import classification_result, rank_scores

        train, train_targets = embeddings.labelled_media(self.train)
        votes = neighbour_votes(
            media,
            train,
            train_targets,
            num_classes=len(self.class_names),
            num_neighbours=self.num_neighbours,
            temperature=self.temperature,
        )
        ranked = rank_scores(votes, targets=self.targets)
        result = classification_result(ranked, targets=self.targets)
        return result, train

    def record(self, outcome: Outcome) -> dict[str, Any]:
        return {
            **super().record(outcome),
            **self.train_record(),
            "num_neighbours": self.num_neighbours,
            "temperature": self.temperature,
        }
