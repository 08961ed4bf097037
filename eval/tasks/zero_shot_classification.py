"""Zero-shot classification: the class of a media item is the one with the nearest prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import read_texts, value_of
from eval.prompts.class_prompts import ClassPrompts, read_class_names, read_prompts
from eval.tasks.single_label import SingleLabelSection, SingleLabelTask, read_targets
from eval.tasks.task import Outcome

if TYPE_CHECKING:
    from torch import Tensor

    from data_prep.report import html
    from eval.metrics.intervals import Bootstrap
    from eval.metrics.zero_shot import ClassificationResult
    from eval.tasks.runner import Embeddings


class ZeroShotClassificationSection(SingleLabelSection):
    """Predicts the class of each media item by the nearest class prompt.

    Samples carry "class_name" in .json, or an index in .cls.
    """

    task: Literal["zero_shot_classification"]
    # A list, or a text file with one name per line, or "open_clip:imagenet"; null: the file that
    # comes with the tars, or the names of the folders
    class_names: list[str] | str | None = None
    # A list or a text file, in which {} or {c} is replaced by the class name; or
    # "open_clip:imagenet", "open_clip:simple"
    prompt_templates: list[str] | str | None = None
    # .json file of class name -> its own prompts, instead of templates (CuPL)
    class_prompts: Path | None = None
    # Key in .json, or npy[i] for element i of .npy; also measures worst-group accuracy
    group_by: str | None = None


@dataclass(frozen=True)
class ZeroShotClassificationTask(SingleLabelTask, section=ZeroShotClassificationSection):
    """Zero-shot classification of the media items of a dataset."""

    prompts: ClassPrompts
    groups: list[str] | None = None  # [Q]; if given, worst-group accuracy is also measured

    conditions = ("class_names", "prompts_sha256")

    @classmethod
    def read(
        cls,
        name: str,
        section: ZeroShotClassificationSection,
        dataset: EvaluationSet,
        *,
        sets: EvaluationSets,
        seed: int,
    ) -> ZeroShotClassificationTask:
        class_names = read_class_names(name, section, dataset)
        prompts = read_prompts(name, section, dataset, class_names)
        samples = list(read_texts(dataset))
        keys, targets = read_targets(samples, dataset, class_names, label=section.label)
        groups = None
        if section.group_by is not None:
            groups = [value_of(sample, section.group_by) for sample in samples]
        items = section.items_of(dataset, keys)
        return cls(name, dataset, keys, class_names, targets, prompts, groups, items=items)

    @property
    def texts(self) -> list[str]:
        return self.prompts.texts

    def method(self) -> str:
        return "zero-shot classification"

    def details(self) -> str:
        groups = "" if self.groups is None else f", {len(set(self.groups))} groups"
        return (
            f"{super().details()}, {len(self.prompts.templates) or 'no'} templates, "
            f"{len(self.texts)} prompts{groups}"
        )

    def measure(
        self, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
    ) -> tuple[ClassificationResult, Tensor]:
        """Returns the result and the class embeddings, [K, D]."""
        from eval.metrics.zero_shot import classify

        class_embeddings = self.prompts.class_embeddings(embeddings.texts(self))
        result = classify(media, class_embeddings, targets=self.targets, groups=self.groups)
        return result, class_embeddings

    def record(self, outcome: Outcome) -> dict[str, Any]:
        record = super().record(outcome) | self.prompts.record()
        if self.groups is not None:
            record["group_accuracies"] = outcome.result.group_accuracies
        return record

    def report_section(self, outcome: Outcome, *, num_queries: int) -> html.Section:
        from data_prep.report import html
        from eval.report.classes import class_blocks

        blocks = class_blocks(
            self.media_sets[0],
            outcome.result,
            class_labels=self.class_labels,
            targets=self.targets,
            groups=self.groups,
        )
        return html.Section(self.name, blocks, note=self.report_note(outcome))
