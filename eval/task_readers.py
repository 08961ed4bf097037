"""Reads everything an evaluation needs besides the model: samples, labels, class names, captions.

Needs no torch, so that `--dry-run` is quick; and it runs before the model is loaded, so that a
missing label is found before hours of encoding.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from data_prep.config_file import InputError
from data_prep.subset import KeptSamples
from eval.class_prompts import check_templates
from eval.config import (
    EvaluateConfig,
    EvaluationSection,
    LinearProbeSection,
    MultiLabelSection,
    RetrievalSection,
    ZeroShotClassificationSection,
)
from eval.sample_labels import class_index_of, classes_of, read_texts, texts_of
from eval.tar_dataset import CLASS_NAMES, TEMPLATES, TarDataset, holds_tars
from eval.tasks import (
    ClassificationTask,
    EvaluationSet,
    LabelledItems,
    LinearProbeTask,
    MediaSet,
    MultiLabelTask,
    RetrievalTask,
    Task,
)

FILE_OF_KEY = {"class_names": CLASS_NAMES, "prompt_templates": TEMPLATES}
# As open_dataset, which is called once for each dataset.
Open = Callable[[Path, str, Path | None], EvaluationSet]
ClassifyingSection = ZeroShotClassificationSection | LinearProbeSection | MultiLabelSection


def read_tasks(config: EvaluateConfig) -> list[Task]:
    """The tasks of a config, in its order, with every label and caption read and checked.

    Raises:
        InputError: a file is missing, or a sample lacks its label or caption, naming it.
    """
    readers = {
        "zero_shot_classification": read_classification_task,
        "linear_probe": read_linear_probe_task,
        "multi_label_classification": read_multi_label_task,
        "retrieval": read_retrieval_task,
    }
    # A dataset that several tasks use is opened, and its media encoded, once.
    open_once = cache(open_dataset)
    return [
        readers[section.task](name, section, open_once)
        for name, section in config.evaluations.items()
    ]


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


def _dataset_of(name: str, section: EvaluationSection, open_once: Open) -> EvaluationSet:
    """The samples that an evaluation measures."""
    dataset = open_once(section.dataset, section.split, section.subset)
    if isinstance(dataset, TarDataset):
        dataset.refuse_other_task(section.task, name=name)
    return dataset


def read_classification_task(
    name: str, section: ZeroShotClassificationSection, open_once: Open
) -> ClassificationTask:
    """The class names, templates and the class of every sample.

    Raises:
        InputError: see `class_index_of`, `read_own_or_beside` and `check_templates`.
    """
    dataset = _dataset_of(name, section, open_once)
    class_names = read_class_names(name, section, dataset)
    templates = check_templates(read_own_or_beside("prompt_templates", name, section, dataset))
    keys, targets = _read_targets(dataset, class_names)
    return ClassificationTask(name, dataset, keys, class_names, templates, targets)


def _read_targets(dataset: EvaluationSet, class_names: list[str]) -> tuple[list[str], np.ndarray]:
    """([Q] keys, [Q] place of each sample's class in class_names)"""
    place_of = {known: place for place, known in enumerate(class_names)}
    keys, targets = [], []
    for sample in read_texts(dataset):
        keys.append(sample.key)
        targets.append(class_index_of(sample, class_names=class_names, place_of=place_of))
    return keys, np.array(targets)


def read_linear_probe_task(
    name: str, section: LinearProbeSection, open_once: Open
) -> LinearProbeTask:
    """The classes of every sample, of the training items and of those to validate on.

    Raises:
        InputError: see `class_index_of` and `read_own_or_beside`; or nothing is there to train on.
    """
    dataset = _dataset_of(name, section, open_once)
    class_names = read_class_names(name, section, dataset)
    keys, targets = _read_targets(dataset, class_names)
    source = open_once(section.train or section.dataset, section.train_split, section.train_subset)
    if source is dataset:
        raise InputError(
            f"evaluations.{name}: {source.folder}: training items are the test's; set train, or "
            "train_split, to others"
        )
    train_keys, train_targets = _read_targets(source, class_names)
    training_set = MediaSet(source, train_keys)
    train = np.arange(len(train_keys))
    if section.validation is not None:
        held_out = open_once(section.validation, section.validation_split, None)
        held_out_keys, of_held_out = _read_targets(held_out, class_names)
        validation = LabelledItems(
            MediaSet(held_out, held_out_keys), np.arange(len(of_held_out)), of_held_out
        )
    else:
        is_held_out = np.array([zlib.crc32(key.encode()) % 10 == 0 for key in train_keys])
        validation = LabelledItems(training_set, train[is_held_out], train_targets[is_held_out])
        train = train[~is_held_out]
    if not len(train) or not len(validation.places):
        raise InputError(
            f"evaluations.{name}: {source.folder}: expected items to train on and to validate; "
            f"found {len(train)} and {len(validation.places)}"
        )
    return LinearProbeTask(
        name,
        dataset,
        keys,
        class_names,
        [],
        targets,
        LabelledItems(training_set, train, train_targets[train]),
        validation,
        section.strength,
    )


def read_multi_label_task(name: str, section: MultiLabelSection, open_once: Open) -> MultiLabelTask:
    """The class names, templates and the classes of every sample.

    Raises:
        InputError: see `classes_of`, `read_own_or_beside` and `check_templates`; or no sample has
            a class.
    """
    dataset = _dataset_of(name, section, open_once)
    class_names = read_class_names(name, section, dataset)
    templates = check_templates(read_own_or_beside("prompt_templates", name, section, dataset))
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


def read_class_names(name: str, section: ClassifyingSection, dataset: EvaluationSet) -> list[str]:
    """The class names of an evaluation.

    Raises:
        InputError: see `read_own_or_beside`; or a name stands twice.
    """
    class_names = read_own_or_beside("class_names", name, section, dataset)
    repeated = sorted({known for known in class_names if class_names.count(known) > 1})
    if repeated:
        raise InputError(f"evaluations.{name}.class_names: these stand twice: {repeated}")
    return class_names


def read_own_or_beside(
    key: str, name: str, section: ClassifyingSection, dataset: EvaluationSet
) -> list[str]:
    """The texts that a key of a section names, or else those of the file that comes with tars.

    Raises:
        InputError: see `read_lines`; or there are none.
    """
    found = getattr(section, key)
    if found is None and isinstance(dataset, TarDataset):
        found = dataset.beside(FILE_OF_KEY[key])
    if found is None:
        raise InputError(
            f"evaluations.{name}.{key}: expected a list, or a text file with one per line; found "
            f"none, and no {FILE_OF_KEY[key]} in {dataset.folder}"
        )
    return read_lines(found)


def read_retrieval_task(name: str, section: RetrievalSection, open_once: Open) -> RetrievalTask:
    """The captions of every sample, and the distractors.

    Raises:
        InputError: a sample has no caption, or the file of distractors cannot be read.
    """
    dataset = _dataset_of(name, section, open_once)
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
