"""Reads everything an evaluation needs besides the model: samples, labels, class names, captions.

Needs no torch, so that `--dry-run` is quick; and it runs before the model is loaded, so that a
missing label is found before hours of encoding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from data_prep.config_file import InputError
from data_prep.subset import KeptSamples
from eval.class_prompts import check_templates
from eval.config import (
    EvaluateConfig,
    MultiLabelSection,
    RetrievalSection,
    ZeroShotClassificationSection,
)
from eval.right_pairs import RightPairs, pairs_of_equal_captions, pairs_of_owners
from eval.sample_labels import class_index_of, classes_of, read_texts, texts_of
from eval.tar_dataset import CLASS_NAMES, TEMPLATES, TarDataset, holds_tars

EvaluationSet = KeptSamples | TarDataset


@dataclass(frozen=True)
class ClassificationTask:
    """Zero-shot classification of the media items of a dataset."""

    name: str
    dataset: EvaluationSet
    keys: list[str]  # [Q] of the samples
    class_names: list[str]  # [K]
    prompt_templates: list[str]
    targets: np.ndarray  # [Q] int64, place in class_names

    def description(self) -> str:
        num_prompts = len(self.class_names) * len(self.prompt_templates)
        return (
            f"{self.name}: zero-shot classification, {len(self.dataset)} {self.dataset.info.media} "
            f"items, {len(self.class_names)} classes, {len(self.prompt_templates)} templates, "
            f"{num_prompts} prompts ({self.dataset.folder})"
        )


@dataclass(frozen=True)
class MultiLabelTask:
    """Zero-shot classification of media items that may be of several classes."""

    name: str
    dataset: EvaluationSet
    keys: list[str]  # [Q] of the samples
    class_names: list[str]  # [K]
    prompt_templates: list[str]
    is_of_class: np.ndarray  # bool [Q, K]

    def description(self) -> str:
        return (
            f"{self.name}: multi-label classification, {len(self.dataset)} "
            f"{self.dataset.info.media} items, {len(self.class_names)} classes, "
            f"{self.is_of_class.sum(axis=1).mean():.2f} of them per item, "
            f"{len(self.prompt_templates)} templates ({self.dataset.folder})"
        )


@dataclass(frozen=True)
class RetrievalTask:
    """Retrieval in both directions between the media items and the captions of a dataset."""

    name: str
    dataset: EvaluationSet
    keys: list[str]  # [Q] of the samples
    captions: list[str]  # [M]
    media_of_text: np.ndarray  # [M] int64: caption m describes media item media_of_text[m]
    distractor_captions: list[str]  # describe no item; in the gallery of media to text only
    ks: list[int]
    merges_equal_captions: bool = False  # each is right for all items that have its words

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


Task = ClassificationTask | MultiLabelTask | RetrievalTask


def read_tasks(config: EvaluateConfig) -> list[Task]:
    """The tasks of a config, in its order, with every label and caption read and checked.

    Raises:
        InputError: a file is missing, or a sample lacks its label or caption, naming it.
    """
    readers = {
        "zero_shot_classification": read_classification_task,
        "multi_label_classification": read_multi_label_task,
        "retrieval": read_retrieval_task,
    }
    # A dataset that several tasks use is opened, and its media encoded, once.
    datasets: dict[tuple[Path, str, Path | None], EvaluationSet] = {}
    tasks = []
    for name, section in config.evaluations.items():
        place = (section.dataset, section.split, section.subset)
        if place not in datasets:
            datasets[place] = open_dataset(*place)
        if isinstance(datasets[place], TarDataset):
            datasets[place].refuse_other_task(section.task, name=name)
        tasks.append(readers[section.task](name, section, datasets[place]))
    return tasks


def open_dataset(folder: Path, split: str, subset: Path | None) -> EvaluationSet:
    """The dataset in a folder, or what a subset keeps of it.

    Args:
        folder: of shards of ours, or of tars.
        split: of a folder of tars that has several.
        subset: of shards of ours.

    Raises:
        InputError: it is missing, unfinished or empty, or the subset is of another dataset.
    """
    if not (folder / "dataset.json").exists() and holds_tars(folder, split=split):
        if subset is not None:
            raise InputError(
                f"{subset}: a subset is of shards with an index, and {folder} holds tars without; "
                "make one with python -m data_prep.index_shards"
            )
        return TarDataset(folder, split=split)
    dataset = KeptSamples(folder, subset=subset)
    if len(dataset) == 0:
        raise InputError(f"{folder}: expected samples to evaluate on, found an empty dataset")
    return dataset


def read_classification_task(
    name: str, section: ZeroShotClassificationSection, dataset: EvaluationSet
) -> ClassificationTask:
    """The class names, templates and the class of every sample.

    Raises:
        InputError: see `class_index_of`, `read_lines` and `check_templates`.
    """
    class_names, templates = read_classes(name, section, dataset)
    place_of = {known: place for place, known in enumerate(class_names)}
    keys, targets = [], []
    for sample in read_texts(dataset):
        keys.append(sample.key)
        targets.append(class_index_of(sample, class_names=class_names, place_of=place_of))
    return ClassificationTask(name, dataset, keys, class_names, templates, np.array(targets))


def read_multi_label_task(
    name: str, section: MultiLabelSection, dataset: EvaluationSet
) -> MultiLabelTask:
    """The class names, templates and the classes of every sample.

    Raises:
        InputError: see `classes_of`, `read_lines` and `check_templates`; or no sample has a class.
    """
    class_names, templates = read_classes(name, section, dataset)
    keys, rows = [], []
    for sample in read_texts(dataset):
        keys.append(sample.key)
        rows.append(classes_of(sample, class_names=class_names))
    is_of_class = np.stack(rows)
    if not is_of_class.any():
        raise InputError(
            f"evaluations.{name}: {dataset.folder}: expected samples with classes, found none"
        )
    return MultiLabelTask(name, dataset, keys, class_names, templates, is_of_class)


def read_classes(
    name: str, section: ZeroShotClassificationSection | MultiLabelSection, dataset: EvaluationSet
) -> tuple[list[str], list[str]]:
    """(class names, prompt templates) of an evaluation.

    Raises:
        InputError: see `read_lines` and `check_templates`; or a name stands twice, or there are
            none.
    """
    files = {"class_names": CLASS_NAMES, "prompt_templates": TEMPLATES}
    found = {key: getattr(section, key) for key in files}
    for key, file_name in files.items():
        if found[key] is None and isinstance(dataset, TarDataset):
            found[key] = dataset.beside(file_name)
        if found[key] is None:
            raise InputError(
                f"evaluations.{name}.{key}: expected a list, or a text file with one per line; "
                f"found none, and no {file_name} in {dataset.folder}"
            )
    class_names = read_lines(found["class_names"])
    repeated = sorted({known for known in class_names if class_names.count(known) > 1})
    if repeated:
        raise InputError(f"evaluations.{name}.class_names: these stand twice: {repeated}")
    return class_names, check_templates(read_lines(found["prompt_templates"]))


def read_retrieval_task(
    name: str, section: RetrievalSection, dataset: EvaluationSet
) -> RetrievalTask:
    """The captions of every sample, and the distractors.

    Raises:
        InputError: a sample has no caption, or the file of distractors cannot be read.
    """
    keys: list[str] = []
    captions: list[str] = []
    media_of_text: list[int] = []
    for ordinal, sample in enumerate(read_texts(dataset)):
        of_sample = texts_of(sample, dataset)
        keys.append(sample.key)
        captions += of_sample
        media_of_text += [ordinal] * len(of_sample)
    distractors = []
    if section.distractor_captions is not None:
        distractors = read_lines(section.distractor_captions)
    return RetrievalTask(
        name,
        dataset,
        keys,
        captions,
        np.array(media_of_text),
        distractors,
        list(section.ks),
        merges_equal_captions=section.equal_captions == "merged",
    )


def read_lines(source: list[str] | Path) -> list[str]:
    """The texts of a list, or of a text file with one per line; blank lines do not count.

    Raises:
        InputError: the file is missing or not UTF-8, or nothing is left.
    """
    lines, place = source, "the list"
    if isinstance(source, Path):
        place = str(source)
        try:
            lines = source.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"{source}: expected a text file with one entry per line: {error}"
            ) from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{place}: expected at least one entry, found none")
    return texts
