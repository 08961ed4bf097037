"""Linear probe: a logistic regression fitted to the embeddings of training items."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import PositiveFloat

from data_prep.errors import InputError
from eval.datasets.columns import DatasetLocation
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.views import samples_having
from eval.embeddings.items import ItemSet
from eval.tasks.single_label import (
    OBJECTIVE,
    LabelledItems,
    TrainedSection,
    TrainedTask,
    check_disjoint,
    read_labelled_items,
    read_trained,
)
from eval.tasks.task import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from eval.metrics.intervals import Bootstrap
    from eval.metrics.linear_probe import LinearProbeResult
    from eval.tasks.runner import Embeddings


VALIDATION_ADVICE = "set validation or validation_split"


class LinearProbeSection(TrainedSection):
    """Classifies by a logistic regression fitted to the embeddings of training items.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    renamed: ClassVar[dict[str, str]] = {"strength": "l2"}

    task: Literal["linear_probe"]
    # Validation items for choosing the L2 penalty; null: about every tenth training item, selected
    # by a hash of its key
    validation: DatasetLocation | None = None
    validation_split: str = "val"
    l2: PositiveFloat | None = None  # weight of the L2 penalty, 1 / C; null: chosen

    def locations(self) -> list[tuple[str, str]]:
        validation = [] if self.validation is None else [(self.validation, self.validation_split)]
        return super().locations() + validation


@dataclass(frozen=True)
class LinearProbeTask(TrainedTask, section=LinearProbeSection):
    """Classification by a logistic regression on embeddings."""

    validation: LabelledItems
    l2: float | None  # weight of the L2 penalty; None: chosen on validation items

    conditions = ("class_names", "train_fingerprint", "validation_fingerprint", "configured_l2")

    @classmethod
    def read(
        cls,
        name: str,
        section: LinearProbeSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> LinearProbeTask:
        fields = read_trained(name, section, dataset, sets)
        train = fields["train"]
        if section.validation is not None:
            held_out = sets.open(
                section.validation, split=section.validation_split, columns=section.columns
            )
            held_out = samples_having(held_out, section.views_of(held_out))
            for role, items in (("test", dataset), ("training", train.source.dataset)):
                check_disjoint(
                    name, ("validation", held_out), (role, items), advice=VALIDATION_ADVICE
                )
            validation = read_labelled_items(held_out, fields["class_names"], section)
        else:
            hashes = [zlib.crc32(key.encode()) for key in train.source.keys]
            is_held_out = np.array(hashes) % 10 == 0
            validation, train = _chosen(train, is_held_out), _chosen(train, ~is_held_out)
        if not len(train.indices) or not len(validation.indices):
            raise InputError(
                f"evaluations.{name}: {train.source.dataset.folder}: expected training and "
                f"validation items; found {len(train.indices)} and {len(validation.indices)}"
            )
        fields["train"] = train
        return cls(**fields, validation=validation, l2=section.l2)

    @property
    def media_sets(self) -> list[ItemSet]:
        return [*super().media_sets, self.validation.source]

    @property
    def learned_items(self) -> list[LabelledItems]:
        return [self.train, self.validation]

    def method(self) -> str:
        return "linear probe"

    def details(self) -> str:
        return f"{super().details()} and {len(self.validation.indices)} validation items"

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[LinearProbeResult, Tensor]:
        """Returns the result, and the weights and biases, [K, D + 1]."""
        from eval.metrics.linear_probe import LinearProbeResult, train_probe, with_ones
        from eval.metrics.zero_shot import classify

        probe, accuracies = train_probe(
            embeddings.labelled_media(self.train),
            embeddings.labelled_media(self.validation),
            num_classes=len(self.class_names),
            l2=self.l2,
        )
        weights = probe.as_class_embeddings()
        classified = classify(with_ones(media), weights, targets=self.targets)
        result = LinearProbeResult(
            **vars(classified), l2=probe.l2, validation_accuracies=accuracies
        )
        return result, weights

    def record(self, outcome: Outcome) -> dict[str, Any]:
        accuracies = outcome.result.validation_accuracies
        return {
            **super().record(outcome),
            **self.train_record(),
            "objective": OBJECTIVE,
            "l2": outcome.result.l2,
            "configured_l2": self.l2,
            "validation_accuracies": {f"{k:.4g}": v for k, v in accuracies.items()},
            "num_validation": len(self.validation.indices),
            "validation_fingerprint": self.validation.source.dataset.fingerprint,
        }


def _chosen(items: LabelledItems, is_chosen: np.ndarray) -> LabelledItems:
    return LabelledItems(items.source, items.indices[is_chosen], items.targets[is_chosen])
