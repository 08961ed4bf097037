"""Content of a sample by modality: bytes of media, texts, vectors and labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.modalities.modality import Modalities, VectorShape, file_extension
from data_prep.modalities.vectors import VectorError, VectorSums, add_vectors, from_npy
from data_prep.shards.sample import (
    CAPTION_KEYS,
    CorruptSampleError,
    Sample,
    captions_in_json,
    captions_of,
    metadata_of,
)


@dataclass(frozen=True)
class SampleContents:
    """The modalities of one sample; a modality that the sample lacks is in no dictionary."""

    shard: str
    key: str
    media: dict[str, bytes] = field(default_factory=dict)
    extensions: dict[str, str] = field(default_factory=dict)  # format of each of `media`
    texts: dict[str, list[str]] = field(default_factory=dict)
    vectors: dict[str, np.ndarray] = field(default_factory=dict)  # float32
    labels: dict[str, Any] = field(default_factory=dict)  # only if the .json was read

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}"

    @property
    def present(self) -> frozenset[str]:
        """Names of the modalities that were read and found."""
        return frozenset((*self.media, *self.texts, *self.vectors))


class PresenceTable:
    """Collects presence masks and sums of vectors for the index of a shard.

    Args:
        modalities: modalities of the dataset; None or a pair dataset: nothing is collected.
    """

    def __init__(self, modalities: Modalities | None):
        self.modalities = None if modalities is None or modalities.is_pair else modalities
        self._masks: list[int] = []
        self._sums: dict[str, VectorSums] = {}

    def add(self, contents: SampleContents | None) -> None:
        """Adds the next sample of the shard; None only for a pair dataset."""
        if self.modalities is None:
            return
        assert contents is not None
        self._masks.append(self.modalities.mask_of(contents.present))
        add_vectors(self._sums, contents.vectors)

    def to_fields(self) -> dict[str, Any]:
        """Returns the fields of ShardIndex that describe modalities."""
        if self.modalities is None:
            return {}
        presence = np.array(self._masks, dtype=np.uint32)
        modalities = self.modalities.without_counts()
        return {"modalities": modalities, "presence": presence, "vector_sums": self._sums}


def fields_of(
    modalities: Modalities, names: Iterable[str], *, fields: Iterable[str]
) -> tuple[str, ...]:
    """Returns the extensions, among those of a dataset, that may hold some modalities."""
    wanted = {extension for name in names for extension in modalities.extensions_of(name)}
    return tuple(extension for extension in fields if extension in wanted)


def contents_of(
    sample: Sample, modalities: Modalities, *, names: Iterable[str] | None = None
) -> SampleContents:
    """Sorts the members of a sample by modality, and parses texts and vectors.

    Args:
        sample: sample with the members of the wanted modalities.
        modalities: modalities of the dataset.
        names: modalities to return; None: all.

    Raises:
        CorruptSampleError: if a text or vector cannot be parsed, or has another shape.
    """
    contents = SampleContents(sample.shard, sample.key)
    names = tuple(modalities) if names is None else tuple(names)
    metadata = metadata_of(sample)
    labels = metadata.get("labels")
    contents.labels.update(labels if isinstance(labels, dict) else {})
    for name in names:
        if modalities[name].kind == "text":
            if texts := texts_of(sample, name, modalities=modalities, metadata=metadata):
                contents.texts[name] = texts
            continue
        extension = modalities.member_of(name, sample.members)
        if extension is None:
            continue
        if modalities[name].kind == "vector":
            contents.vectors[name] = _vector_of(sample, name, extension, modalities=modalities)
        else:
            contents.media[name] = sample.members[extension]
            contents.extensions[name] = file_extension(extension)
    return contents


def texts_of(
    sample: Sample, name: str, *, modalities: Modalities, metadata: dict[str, Any]
) -> list[str]:
    """Returns the texts of one modality, without empty ones; [] if there are none.

    The `.json` takes precedence over the `.txt`, as for the captions of pairs.

    Args:
        sample: sample with its `.json` and `.txt` members.
        name: modality of kind text.
        modalities: modalities of the dataset.
        metadata: content of the `.json`.

    Raises:
        CorruptSampleError: if the value is not text or a list of texts, or not UTF-8. Also if a
            sample of a pair dataset has no captions.
    """
    if modalities.is_pair:
        return captions_of(sample, metadata=metadata)
    keys: Iterable[str] = (name,)
    if name == "text":  # `caption` may be the name of another modality
        keys = [key for key in CAPTION_KEYS if key == name or key not in modalities]
    found = captions_in_json(metadata, list(keys))
    if found:
        listed = found if isinstance(found, list) else [found]
        if not all(isinstance(text, str) for text in listed):
            raise CorruptSampleError(f"{sample}: .json: expected text in {name}, found {found!r}")
        texts = [text.strip() for text in listed if text.strip()]
        if texts:
            return texts
    for extension in modalities.extensions_of(name):
        if extension != "json" and extension in sample.members:
            return [text] if (text := _decoded(sample, extension)) else []
    return []


def _decoded(sample: Sample, extension: str) -> str:
    try:
        return sample.members[extension].decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CorruptSampleError(f"{sample}: .{extension} is not UTF-8: {error}") from None


def _vector_of(sample: Sample, name: str, extension: str, *, modalities: Modalities) -> np.ndarray:
    modality = modalities[name]
    shape = None
    if modality.width is not None:
        shape = VectorShape(modality.width, is_sequence=modality.is_sequence)
    try:
        return from_npy(sample.members[extension], shape=shape)
    except VectorError as error:
        raise CorruptSampleError(f"{sample}: .{extension}: {error}") from None
