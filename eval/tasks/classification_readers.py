"""Reads what classifications need besides the model: names, prompts and classes."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.sample import Sample
from eval.config import (
    EvaluateConfig,
    FewShotSection,
    LinearProbeSection,
    MultiLabelSection,
    NearestNeighboursSection,
    ZeroShotClassificationSection,
)
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import class_index_of, classes_of, read_texts, value_of
from eval.tasks.class_texts import place_of_classes, read_class_names, read_prompts
from eval.tasks.task import (
    ClassificationTask,
    FewShotTask,
    LabelledItems,
    LinearProbeTask,
    MediaSet,
    MultiLabelTask,
    NearestNeighboursTask,
)


def read_classification_task(
    name: str, section: ZeroShotClassificationSection, sets: EvaluationSets, _: EvaluateConfig
) -> ClassificationTask:
    """The class names, prompts and the class of every sample.

    Raises:
        InputError: see `class_index_of` and eval.tasks.class_texts; or a sample has no group.
    """
    dataset = sets.of_section(name, section)
    class_names = read_class_names(name, section, dataset)
    templates, prompts = read_prompts(name, section, dataset, class_names)
    samples = list(read_texts(dataset))
    keys, targets = _targets_of(samples, dataset, class_names)
    groups = None
    if section.group_by is not None:
        groups = [value_of(sample, section.group_by) for sample in samples]
    return ClassificationTask(name, dataset, keys, class_names, targets, templates, prompts, groups)


def _read_targets(dataset: EvaluationSet, class_names: list[str]) -> tuple[list[str], np.ndarray]:
    """As `_targets_of`, of all samples of a dataset."""
    return _targets_of(read_texts(dataset), dataset, class_names)


def _targets_of(
    samples: Iterable[Sample], dataset: EvaluationSet, class_names: list[str]
) -> tuple[list[str], np.ndarray]:
    """([Q] keys, [Q] place of each sample's class in class_names)"""
    place_of = place_of_classes(class_names, dataset)
    keys, targets = [], []
    for sample in samples:
        keys.append(sample.key)
        targets.append(class_index_of(sample, class_names=class_names, place_of=place_of))
    return keys, np.array(targets)


def _read_trained(
    name: str,
    section: LinearProbeSection | NearestNeighboursSection | FewShotSection,
    sets: EvaluationSets,
) -> dict[str, Any]:
    """What all tasks that learn from labelled items are built from."""
    dataset = sets.of_section(name, section)
    class_names = read_class_names(name, section, dataset)
    keys, targets = _read_targets(dataset, class_names)
    source = sets.open(
        section.train or section.dataset,
        split=section.train_split,
        subset=section.train_subset,
        columns=section.columns,
    )
    if source is dataset:
        raise InputError(
            f"evaluations.{name}: {source.folder}: training items are the test's; set train, or "
            "train_split, to others"
        )
    train_keys, train_targets = _read_targets(source, class_names)
    train = LabelledItems(MediaSet(source, train_keys), np.arange(len(train_keys)), train_targets)
    return {
        "name": name,
        "dataset": dataset,
        "keys": keys,
        "class_names": class_names,
        "targets": targets,
        "train": train,
    }


def read_linear_probe_task(
    name: str, section: LinearProbeSection, sets: EvaluationSets, _: EvaluateConfig
) -> LinearProbeTask:
    """The classes of every sample, of the training items and of those to validate on.

    Raises:
        InputError: see `class_index_of` and eval.tasks.class_texts; or there are no training items.
    """
    parts = _read_trained(name, section, sets)
    train = parts["train"]
    if section.validation is not None:
        held_out = sets.open(
            section.validation, split=section.validation_split, columns=section.columns
        )
        keys, targets = _read_targets(held_out, parts["class_names"])
        validation = LabelledItems(MediaSet(held_out, keys), np.arange(len(keys)), targets)
    else:
        sums = [zlib.crc32(key.encode()) for key in train.source.keys]
        is_held_out = np.array(sums) % 10 == 0
        validation, train = _chosen(train, is_held_out), _chosen(train, ~is_held_out)
    if not len(train.indices) or not len(validation.indices):
        raise InputError(
            f"evaluations.{name}: {train.source.dataset.folder}: expected items to train on and to "
            f"validate; found {len(train.indices)} and {len(validation.indices)}"
        )
    parts["train"] = train
    return LinearProbeTask(**parts, validation=validation, l2=section.l2)


def _chosen(items: LabelledItems, is_chosen: np.ndarray) -> LabelledItems:
    return LabelledItems(items.source, items.indices[is_chosen], items.targets[is_chosen])


def read_nearest_neighbours_task(
    name: str, section: NearestNeighboursSection, sets: EvaluationSets, _: EvaluateConfig
) -> NearestNeighboursTask:
    """The classes of every sample, and of the training items.

    Raises:
        InputError: see `class_index_of` and eval.tasks.class_texts.
    """
    return NearestNeighboursTask(
        **_read_trained(name, section, sets),
        num_neighbours=section.num_neighbours,
        temperature=section.temperature,
    )


def read_few_shot_task(
    name: str, section: FewShotSection, sets: EvaluationSets, config: EvaluateConfig
) -> FewShotTask:
    """The classes of every sample, and of the training items.

    Raises:
        InputError: see `class_index_of` and eval.tasks.class_texts; or a class has too few items.
    """
    parts = _read_trained(name, section, sets)
    class_names, train = parts["class_names"], parts["train"]
    counts = np.bincount(train.targets, minlength=len(class_names))
    if counts.min() < max(section.shots):
        raise InputError(
            f"evaluations.{name}: {train.source.dataset.folder}: expected at least "
            f"{max(section.shots)} training items of each class (shots), found {counts.min()} of "
            f"{class_names[int(counts.argmin())]!r}"
        )
    return FewShotTask(
        **parts,
        shots=sorted(section.shots),
        num_draws=section.num_draws,
        l2=section.l2,
        seed=config.seed,
    )


def read_multi_label_task(
    name: str, section: MultiLabelSection, sets: EvaluationSets, _: EvaluateConfig
) -> MultiLabelTask:
    """The class names, prompts and the classes of every sample.

    Raises:
        InputError: see `classes_of` and eval.tasks.class_texts; or no sample has a class.
    """
    dataset = sets.of_section(name, section)
    class_names = read_class_names(name, section, dataset)
    templates, prompts = read_prompts(name, section, dataset, class_names)
    place_of = place_of_classes(class_names, dataset)
    keys, rows = [], []
    for sample in read_texts(dataset):
        keys.append(sample.key)
        rows.append(classes_of(sample, class_names=class_names, place_of=place_of))
    is_of_class = np.stack(rows)
    if not is_of_class.any():
        raise InputError(
            f"evaluations.{name}: {dataset.folder}: expected samples with classes, found none"
        )
    return MultiLabelTask(name, dataset, keys, class_names, templates, prompts, is_of_class)
