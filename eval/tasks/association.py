"""Association: choosing the media items that belong to a cue word from a few candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import read_texts, texts_of, value_of
from eval.tasks.task import CaptionedSection, Outcome, Task

if TYPE_CHECKING:
    from torch import Tensor

    from eval.metrics.association import AssociationResult
    from eval.metrics.intervals import Bootstrap
    from eval.report.differences import Difference, ResultPair
    from eval.tasks.runner import Embeddings

FLAGS = {"1": True, "true": True, "0": False, "false": False}


class AssociationSection(CaptionedSection):
    """Chooses the media items that belong to a cue word from a few candidates (WinoGAViL).

    Samples carry the cue as caption in .json or .txt, and in .json whether they belong to it.
    """

    task: Literal["association"]
    group_by: str  # key in .json; items with the same value share a cue and form the candidates
    # Key in .json: whether the item belongs to the cue, 1 or 0, true or false
    right: str = "is_association"


@dataclass(frozen=True)
class AssociationTask(Task, section=AssociationSection):
    """Choice of the media items that belong to a cue from a few candidates."""

    groups: dict[str, list[int]]  # name of the group -> indices of its candidate items
    cues: list[str]  # [groups]
    is_correct: np.ndarray  # bool [Q]

    dataset_types = ("retrieval",)
    main_metrics = ("jaccard",)
    conditions = ("cues_sha256", "right_sha256")

    @classmethod
    def read(
        cls,
        name: str,
        section: AssociationSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> AssociationTask:
        keys, is_correct = [], []
        groups: dict[str, list[int]] = defaultdict(list)
        cues: dict[str, str] = {}
        for ordinal, sample in enumerate(read_texts(dataset)):
            keys.append(sample.key)
            flag = value_of(sample, section.right).lower()
            if flag not in FLAGS:
                raise InputError(f"{sample}: {section.right}: expected 1 or 0, found {flag!r}")
            is_correct.append(FLAGS[flag])
            group, cue = value_of(sample, section.group_by), texts_of(sample, dataset)[0]
            if cues.setdefault(group, cue) != cue:
                raise InputError(
                    f"{sample}: {section.group_by} {group!r}: expected one cue, found "
                    f"{cues[group]!r} and {cue!r}"
                )
            groups[group].append(ordinal)
        flags = np.array(is_correct)
        without = [group for group, indices in groups.items() if not flags[indices].any()]
        if without:
            raise InputError(
                f"evaluations.{name}: {dataset.folder}: {section.group_by} {without[0]!r}: "
                f"expected samples that belong to the cue ({section.right}), found none"
            )
        return cls(name, dataset, keys, dict(groups), list(cues.values()), flags)

    @property
    def texts(self) -> list[str]:
        """The cues, one per group."""
        return self.cues

    @property
    def text_name(self) -> str:
        return f"cues of {self.name}"

    def method(self) -> str:
        return "association"

    def details(self) -> str:
        return f"{len(self.groups)} cues, {int(self.is_correct.sum())} items that belong to a cue"

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[AssociationResult, Tensor]:
        """Returns the result and the embeddings of the cues, [groups, D]."""
        from eval.metrics.association import associate

        cues = embeddings.texts(self)
        result = associate(
            media,
            cues,
            groups=list(self.groups.values()),
            is_correct=self.is_correct,
        )
        return result, cues

    def record(self, outcome: Outcome) -> dict[str, Any]:
        from eval.embeddings.store import checksum_of_arrays, checksum_of_texts

        return {
            "num_queries": len(self.cues),
            "num_media": len(self.dataset),
            "cues_sha256": checksum_of_texts(self.cues),
            "right_sha256": checksum_of_arrays(self.is_correct),
        }

    def predictions(self, outcome: Outcome) -> dict[str, Mapping[str, Any]]:
        return {"": {"key": list(self.groups), "cue": self.cues, "jaccard": outcome.result.jaccard}}

    @classmethod
    def differences(cls, pair: ResultPair) -> Iterator[Difference]:
        yield from pair.mean_differences({metric: metric for metric in pair.record["scores"]})
