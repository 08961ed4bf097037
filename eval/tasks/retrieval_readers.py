"""Reads what retrievals need besides the model: captions, and which items belong together."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from data_prep.errors import InputError
from eval.config import (
    AssociationSection,
    CaptionChoiceSection,
    EvaluateConfig,
    MediaRetrievalSection,
    RetrievalSection,
)
from eval.datasets.datasets import EvaluationSet, EvaluationSets
from eval.datasets.labels import negative_captions_of, read_texts, texts_of, value_of
from eval.metrics.relevance import relevance_of_equal_values
from eval.tasks.class_texts import read_lines
from eval.tasks.task import (
    AssociationTask,
    CaptionChoiceTask,
    MediaRetrievalTask,
    MediaSet,
    RetrievalTask,
)

TRUTHS = {"1": True, "true": True, "0": False, "false": False}


def read_retrieval_task(
    name: str, section: RetrievalSection, sets: EvaluationSets, _: EvaluateConfig
) -> RetrievalTask:
    """The captions of every sample, and the distractors.

    Raises:
        InputError: a sample has no caption, or the file of distractors cannot be read.
    """
    dataset = sets.of_section(name, section)
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
    dataset = sets.of_section(name, section)
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
    relevance = relevance_of_equal_values(values, other_values)
    partners = MediaSet(other, other_keys)
    return MediaRetrievalTask(name, dataset, keys, partners, relevance, list(section.ks))


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
    dataset = sets.of_section(name, section)
    keys, captions, members = [], [], defaultdict(list)
    for ordinal, sample in enumerate(read_texts(dataset)):
        keys.append(sample.key)
        right = texts_of(sample, dataset)[:1]
        if section.group_by is None:
            captions.append(right + negative_captions_of(sample))
        else:
            captions.append(right)
            members[value_of(sample, section.group_by)].append(ordinal)
    lonely = [value for value, indices in members.items() if len(indices) < 2]
    if lonely:
        raise InputError(
            f"evaluations.{name}: {dataset.folder}: {section.group_by} {lonely[0]!r}: expected two "
            "samples or more, found one"
        )
    groups = list(members.values()) if section.group_by is not None else None
    return CaptionChoiceTask(name, dataset, keys, captions, groups)


def read_association_task(
    name: str, section: AssociationSection, sets: EvaluationSets, _: EvaluateConfig
) -> AssociationTask:
    """The cues, and which samples belong to theirs.

    Raises:
        InputError: a sample does not say, a group has several cues, or none of its samples belongs.
    """
    dataset = sets.of_section(name, section)
    keys, is_right = [], []
    groups: dict[str, list[int]] = defaultdict(list)
    cues: dict[str, str] = {}
    for ordinal, sample in enumerate(read_texts(dataset)):
        keys.append(sample.key)
        said = value_of(sample, section.right).lower()
        if said not in TRUTHS:
            raise InputError(f"{sample}: {section.right}: expected 1 or 0, found {said!r}")
        is_right.append(TRUTHS[said])
        group, cue = value_of(sample, section.group_by), texts_of(sample, dataset)[0]
        if cues.setdefault(group, cue) != cue:
            raise InputError(
                f"{sample}: {section.group_by} {group!r}: expected one cue, found {cues[group]!r} "
                f"and {cue!r}"
            )
        groups[group].append(ordinal)
    flags = np.array(is_right)
    without = [group for group, indices in groups.items() if not flags[indices].any()]
    if without:
        raise InputError(
            f"evaluations.{name}: {dataset.folder}: {section.group_by} {without[0]!r}: expected "
            f"samples that belong to the cue ({section.right}), found none"
        )
    return AssociationTask(name, dataset, keys, dict(groups), list(cues.values()), flags)
