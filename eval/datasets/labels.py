"""Captions and class labels of samples. Does not import torch."""

from __future__ import annotations

import difflib
import io
import re
from collections.abc import Callable, Iterator

import numpy as np

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    captions_of,
    metadata_of,
)
from data_prep.shards.sample_contents import texts_of as texts_of_modality
from data_prep.shards.subset import KeptSamples
from eval.datasets.datasets import EvaluationSet
from eval.datasets.tar_dataset import TarDataset

NUMBER_OF_ARRAY = re.compile(r"npy\[(\d+)\]")
TEXT_FIELDS = ("json", "txt", "cls", "npy")


def read_texts(dataset: EvaluationSet) -> Iterator[Sample]:
    """Yields the samples of a dataset in order, without their media.

    Raises:
        InputError: if a member is damaged; the message names shard and key.
    """
    modalities = named_modalities(dataset)
    has_vectors = modalities is not None and "vector" in modalities  # stored as .npy, not classes
    fields = tuple(name for name in TEXT_FIELDS if name != "npy" or not has_vectors)
    for ordinal in range(len(dataset)):
        yield _or_input_error(dataset.read_sample, ordinal, fields=fields)


def named_modalities(dataset: EvaluationSet) -> Modalities | None:
    """Returns the modalities of shards that name them; None for media with captions."""
    if not isinstance(dataset, KeptSamples) or dataset.dataset.modalities.is_pair:
        return None
    return dataset.dataset.modalities


def texts_of(sample: Sample, dataset: EvaluationSet) -> list[str]:
    """Returns the captions of a sample.

    Raises:
        InputError: if the sample has no caption.
    """
    modalities = named_modalities(dataset)
    if modalities is not None:
        metadata = _or_input_error(metadata_of, sample)
        options = {"modalities": modalities, "metadata": metadata}
        texts = _or_input_error(texts_of_modality, sample, "text", **options)
        if not texts:
            raise InputError(f"{sample}: expected a text, found members {sorted(sample.members)}")
        return texts
    read = dataset.captions_of if isinstance(dataset, TarDataset) else captions_of
    return _or_input_error(read, sample)


def class_index_of(
    sample: Sample, *, class_names: list[str], index_of: dict[str, int], label: str | None = None
) -> int:
    """Returns the index of a sample's class, from "class_name" in `.json`, else from `.cls`.

    Args:
        sample: sample without its media.
        class_names: [K]
        index_of: class name -> index in `class_names`.
        label: label column, or other key in `.json`, that holds the class name instead.

    Raises:
        InputError: if the sample has no class, or its class is not in `class_names`.
    """
    if label is None:
        found = _or_input_error(metadata_of, sample).get("class_name")
    else:
        found = value_of(sample, label)
    if found is not None:
        if not isinstance(found, str):
            raise InputError(f"{sample}: class_name: expected text, found {found!r:.80}")
        if class_names.count(found) > 1:
            raise InputError(
                f"{sample}: class {found!r} is a duplicate in class_names; store the class index "
                "in .cls instead"
            )
        if found not in index_of:
            nearest = difflib.get_close_matches(str(found), class_names, n=1, cutoff=0.0)
            raise InputError(
                f"{sample}: class {found!r} is not one of the {len(class_names)} class_names; "
                f"the nearest is {nearest[0]!r}"
            )
        return index_of[found]
    if "cls" not in sample.members:
        raise InputError(
            f'{sample}: expected "class_name" in .json or an index in .cls, found neither; '
            f"members: {sorted(sample.members)}"
        )
    text = sample.members["cls"].decode("ascii", errors="replace").strip()
    if not text.isdecimal() or int(text) >= len(class_names):
        raise InputError(
            f"{sample}: .cls: expected an index from 0 to {len(class_names) - 1}, found {text!r}"
        )
    return int(text)


def classes_of(sample: Sample, *, class_names: list[str], index_of: dict[str, int]) -> np.ndarray:
    """Returns the classes of a sample, from "class_names" in `.json`, else from `.npy`.

    Args:
        sample: sample without its media.
        class_names: [K]
        index_of: class name -> index in `class_names`.

    Returns:
        Bool [K].

    Raises:
        InputError: if the sample has neither member, or a class is not in `class_names`.
    """
    found = _or_input_error(metadata_of, sample).get("class_names")
    if found is not None:
        if not isinstance(found, list) or any(isinstance(each, list | dict) for each in found):
            raise InputError(
                f"{sample}: class_names: expected a list of names, found {found!r:.80}"
            )
        unknown = sorted(set(map(str, found)) - set(index_of))
        if unknown:
            raise InputError(
                f"{sample}: classes {unknown} are not among the {len(class_names)} class_names"
            )
        indices = {index_of[known] for known in found}
        return np.array([index in indices for index in range(len(class_names))])
    if "npy" not in sample.members:
        raise InputError(
            f'{sample}: expected "class_names" in .json or one number per class in .npy, found '
            f"neither; members: {sorted(sample.members)}"
        )
    try:
        flags = np.load(io.BytesIO(sample.members["npy"]), allow_pickle=False)
    except ValueError as error:
        raise InputError(f"{sample}: .npy: not an array of numbers: {error}") from None
    if flags.shape != (len(class_names),) or not np.isin(flags, (0, 1)).all():
        raise InputError(
            f"{sample}: .npy: expected {len(class_names)} numbers, each 0 or 1, found shape "
            f"{flags.shape} with values {np.unique(flags)[:5].tolist()}"
        )
    return flags.astype(bool)


def value_of(sample: Sample, key: str) -> str:
    """Returns a label of a sample or another key in its `.json`; "npy[i]": element i of `.npy`.

    Raises:
        InputError: if the sample has no such value.
    """
    in_array = NUMBER_OF_ARRAY.fullmatch(key)
    if in_array is None:
        metadata = _or_input_error(metadata_of, sample)
        labels = metadata.get("labels")
        if isinstance(labels, dict) and labels.get(key) is not None:
            return str(labels[key])
        if metadata.get(key) is None:
            raise InputError(f"{sample}: expected {key!r} in .json, found {sorted(metadata)}")
        return str(metadata[key])
    try:
        numbers = np.load(io.BytesIO(sample.members["npy"]), allow_pickle=False)
        return str(numbers[int(in_array[1])])
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{sample}: expected {key} in .npy: {error}") from None


def read_values(dataset: EvaluationSet, key: str | None) -> tuple[list[str], list[str]]:
    """Reads the [Q] keys of all samples, and the [Q] values by which they are matched.

    Args:
        dataset: Q samples.
        key: key in `.json`; None: the values are the keys.

    Raises:
        InputError: if a sample has no such value, or is damaged.
    """
    samples = list(read_texts(dataset))
    keys = [sample.key for sample in samples]
    return keys, keys if key is None else [value_of(sample, key) for sample in samples]


def negative_captions_of(sample: Sample) -> list[str]:
    """Returns a sample's wrong captions, from "negative_captions" or "negative_caption" in `.json`.

    Raises:
        InputError: if the sample has no wrong caption.
    """
    metadata = _or_input_error(metadata_of, sample)
    found = metadata.get("negative_captions") or metadata.get("negative_caption") or []
    captions = [found] if isinstance(found, str) else found
    if not isinstance(captions, list) or not all(isinstance(each, str) for each in captions):
        raise InputError(
            f"{sample}: negative_captions: expected text or a list of texts, found {found!r:.80}"
        )
    if not captions:
        raise InputError(
            f'{sample}: expected "negative_captions" in .json, found {sorted(metadata)}; for '
            "groups of samples that serve as each other's wrong answers, set group_by"
        )
    return captions


def _or_input_error(read: Callable, *arguments: object, **options: object) -> object:
    """Turns a corrupt sample into an error: metrics that skip samples would be misleading."""
    try:
        return read(*arguments, **options)
    except CorruptSampleError as error:
        raise InputError(str(error)) from None
