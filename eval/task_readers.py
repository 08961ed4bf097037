"""Reads everything an evaluation needs besides the model: samples, labels, class names, captions.

Needs no torch, so that `--dry-run` is quick; and it runs before the model is loaded, so that a
missing label is found before hours of encoding.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.config_file import InputError
from eval.class_texts import place_of_classes, read_class_names, read_lines, read_prompts
from eval.config import (
    CaptionChoiceSection,
    EvaluateConfig,
    EvaluationSection,
    FewShotSection,
    LinearProbeSection,
    MediaRetrievalSection,
    MultiLabelSection,
    NearestNeighboursSection,
    RetrievalSection,
    ZeroShotClassificationSection,
)
from eval.dataset_download import fetch_dataset
from eval.evaluation_sets import EvaluationSet, EvaluationSets, MissingDatasetError
from eval.right_pairs import pairs_of_equal_values
from eval.sample_labels import (
    class_index_of,
    classes_of,
    negative_captions_of,
    read_texts,
    texts_of,
    value_of,
)
from eval.tar_dataset import TarDataset
from eval.tasks import (
    CaptionChoiceTask,
    ClassificationTask,
    FewShotTask,
    LabelledItems,
    LinearProbeTask,
    MediaRetrievalTask,
    MediaSet,
    MultiLabelTask,
    NearestNeighboursTask,
    RetrievalTask,
    Task,
)


@dataclass(frozen=True)
class Tasks:
    """What a config asks for."""

    present: list[Task]
    skipped: dict[str, str]  # evaluation -> why; only where the config lets them be


def fetch_datasets(config: EvaluateConfig) -> None:
    """Fetches what evaluations name by URL and is not there yet.

    Raises:
        InputError: there is nothing at a URL.
        RunError: it cannot be fetched now.
    """
    for section in config.evaluations.values():
        fetch_dataset(section.dataset, split=section.split)
        for key in ("train", "validation", "other"):
            place = getattr(section, key, None)
            if place is not None:
                fetch_dataset(place, split=getattr(section, f"{key}_split"))


def read_tasks(config: EvaluateConfig) -> Tasks:
    """The tasks of a config, in its order, with every label and caption read and checked.

    Raises:
        InputError: a file is missing, or a sample lacks its label or caption, naming it.
    """
    readers = {
        "zero_shot_classification": read_classification_task,
        "linear_probe": read_linear_probe_task,
        "nearest_neighbours": read_nearest_neighbours_task,
        "few_shot": read_few_shot_task,
        "multi_label_classification": read_multi_label_task,
        "retrieval": read_retrieval_task,
        "media_retrieval": read_media_retrieval_task,
        "caption_choice": read_caption_choice_task,
    }
    sets = EvaluationSets()
    present, skipped = [], {}
    for name, section in config.evaluations.items():
        try:
            present.append(readers[section.task](name, section, sets, config))
        except MissingDatasetError as error:
            if not config.skip_missing:
                raise InputError(f"evaluations.{name}: {error}") from None
            skipped[name] = str(error)
    return Tasks(present, skipped)


def _dataset_of(name: str, section: EvaluationSection, sets: EvaluationSets) -> EvaluationSet:
    """The samples that an evaluation measures."""
    dataset = sets.of_section(section)
    if isinstance(dataset, TarDataset):
        dataset.refuse_other_task(section.task, name=name)
    return dataset


# ------------------------------------------------------------------------------- classification


def read_classification_task(
    name: str, section: ZeroShotClassificationSection, sets: EvaluationSets, _: EvaluateConfig
) -> ClassificationTask:
    """The class names, prompts and the class of every sample.

    Raises:
        InputError: see `class_index_of` and eval.class_texts; or a sample has no group.
    """
    dataset = _dataset_of(name, section, sets)
    class_names = read_class_names(name, section, dataset)
    templates, prompts = read_prompts(name, section, dataset, class_names)
    keys, targets = _read_targets(dataset, class_names)
    groups = None
    if section.group_by is not None:
        groups = [value_of(sample, section.group_by) for sample in read_texts(dataset)]
    return ClassificationTask(name, dataset, keys, class_names, targets, templates, prompts, groups)


def _read_targets(dataset: EvaluationSet, class_names: list[str]) -> tuple[list[str], np.ndarray]:
    """([Q] keys, [Q] place of each sample's class in class_names)"""
    place_of = place_of_classes(class_names, dataset)
    keys, targets = [], []
    for sample in read_texts(dataset):
        keys.append(sample.key)
        targets.append(class_index_of(sample, class_names=class_names, place_of=place_of))
    return keys, np.array(targets)


@dataclass(frozen=True)
class _TrainedParts:
    """What all tasks that learn from labelled items have; the names are TrainedTask's."""

    name: str
    dataset: EvaluationSet
    keys: list[str]
    class_names: list[str]
    targets: np.ndarray
    train: LabelledItems

    def as_arguments(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def _read_trained_parts(
    name: str,
    section: LinearProbeSection | NearestNeighboursSection | FewShotSection,
    sets: EvaluationSets,
) -> _TrainedParts:
    dataset = _dataset_of(name, section, sets)
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
    return _TrainedParts(name, dataset, keys, class_names, targets, train)


def read_linear_probe_task(
    name: str, section: LinearProbeSection, sets: EvaluationSets, _: EvaluateConfig
) -> LinearProbeTask:
    """The classes of every sample, of the training items and of those to validate on.

    Raises:
        InputError: see `class_index_of` and eval.class_texts; or nothing is there to train on.
    """
    parts = _read_trained_parts(name, section, sets)
    train = parts.train
    if section.validation is not None:
        held_out = sets.open(
            section.validation, split=section.validation_split, columns=section.columns
        )
        keys, targets = _read_targets(held_out, parts.class_names)
        validation = LabelledItems(MediaSet(held_out, keys), np.arange(len(keys)), targets)
    else:
        sums = [zlib.crc32(key.encode()) for key in train.source.keys]
        is_held_out = np.array(sums) % 10 == 0
        validation, train = _chosen(train, is_held_out), _chosen(train, ~is_held_out)
    if not len(train.places) or not len(validation.places):
        raise InputError(
            f"evaluations.{name}: {train.source.dataset.folder}: expected items to train on and to "
            f"validate; found {len(train.places)} and {len(validation.places)}"
        )
    arguments = parts.as_arguments() | {"train": train}
    return LinearProbeTask(**arguments, validation=validation, strength=section.strength)


def _chosen(items: LabelledItems, is_chosen: np.ndarray) -> LabelledItems:
    return LabelledItems(items.source, items.places[is_chosen], items.targets[is_chosen])


def read_nearest_neighbours_task(
    name: str, section: NearestNeighboursSection, sets: EvaluationSets, _: EvaluateConfig
) -> NearestNeighboursTask:
    """The classes of every sample, and of the training items.

    Raises:
        InputError: see `class_index_of` and eval.class_texts.
    """
    return NearestNeighboursTask(
        **_read_trained_parts(name, section, sets).as_arguments(),
        num_neighbours=section.num_neighbours,
        temperature=section.temperature,
    )


def read_few_shot_task(
    name: str, section: FewShotSection, sets: EvaluationSets, config: EvaluateConfig
) -> FewShotTask:
    """The classes of every sample, and of the training items.

    Raises:
        InputError: see `class_index_of` and eval.class_texts; or a class has too few items.
    """
    parts = _read_trained_parts(name, section, sets)
    counts = np.bincount(parts.train.targets, minlength=len(parts.class_names))
    if counts.min() < max(section.shots):
        raise InputError(
            f"evaluations.{name}: {parts.train.source.dataset.folder}: expected at least "
            f"{max(section.shots)} training items of each class (shots), found {counts.min()} of "
            f"{parts.class_names[int(counts.argmin())]!r}"
        )
    return FewShotTask(
        **parts.as_arguments(),
        shots=sorted(section.shots),
        num_draws=section.num_draws,
        strength=section.strength,
        seed=config.seed,
    )


def read_multi_label_task(
    name: str, section: MultiLabelSection, sets: EvaluationSets, _: EvaluateConfig
) -> MultiLabelTask:
    """The class names, prompts and the classes of every sample.

    Raises:
        InputError: see `classes_of` and eval.class_texts; or no sample has a class.
    """
    dataset = _dataset_of(name, section, sets)
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


# ------------------------------------------------------------------------------------ retrieval


def read_retrieval_task(
    name: str, section: RetrievalSection, sets: EvaluationSets, _: EvaluateConfig
) -> RetrievalTask:
    """The captions of every sample, and the distractors.

    Raises:
        InputError: a sample has no caption, or the file of distractors cannot be read.
    """
    dataset = _dataset_of(name, section, sets)
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


def read_media_retrieval_task(
    name: str, section: MediaRetrievalSection, sets: EvaluationSets, _: EvaluateConfig
) -> MediaRetrievalTask:
    """Which items of two datasets belong together.

    Raises:
        InputError: both hold the same kind of media, or an item has no partner.
    """
    dataset = _dataset_of(name, section, sets)
    other = sets.open(section.other, split=section.other_split, columns=section.columns)
    if other.info.media == dataset.info.media:
        raise InputError(
            f"evaluations.{name}: expected media of two kinds, found {other.info.media} in "
            f"{dataset.folder} and in {other.folder}"
        )
    keys, values = _read_values(dataset, section.pair_by)
    other_keys, other_values = _read_values(other, section.pair_by)
    for ours, theirs, holder in ((values, other_values, dataset), (other_values, values, other)):
        lonely = sorted(set(ours) - set(theirs))
        if lonely:
            raise InputError(
                f"evaluations.{name}: {holder.folder}: {section.pair_by or 'key'} {lonely[0]!r} "
                f"and {len(lonely) - 1} others have no partner in the other dataset"
            )
    pairs = pairs_of_equal_values(values, other_values)
    partners = MediaSet(other, other_keys)
    return MediaRetrievalTask(name, dataset, keys, partners, pairs, list(section.ks))


def _read_values(dataset: EvaluationSet, key: str | None) -> tuple[list[str], list[str]]:
    """([Q] keys, [Q] what pairs are made by)"""
    samples = list(read_texts(dataset))
    keys = [sample.key for sample in samples]
    return keys, keys if key is None else [value_of(sample, key) for sample in samples]


def read_caption_choice_task(
    name: str, section: CaptionChoiceSection, sets: EvaluationSets, _: EvaluateConfig
) -> CaptionChoiceTask:
    """The right and the wrong captions of every sample, or the samples that belong together.

    Raises:
        InputError: a sample lacks them, or stands alone.
    """
    dataset = _dataset_of(name, section, sets)
    keys, captions, members = [], [], defaultdict(list)
    for ordinal, sample in enumerate(read_texts(dataset)):
        keys.append(sample.key)
        right = texts_of(sample, dataset)[:1]
        if section.group_by is None:
            captions.append(right + negative_captions_of(sample))
        else:
            captions.append(right)
            members[value_of(sample, section.group_by)].append(ordinal)
    lonely = [value for value, places in members.items() if len(places) < 2]
    if lonely:
        raise InputError(
            f"evaluations.{name}: {dataset.folder}: {section.group_by} {lonely[0]!r}: expected two "
            "samples or more, found one"
        )
    groups = list(members.values()) if section.group_by is not None else None
    return CaptionChoiceTask(name, dataset, keys, captions, groups)
