"""Items of an evaluation set whose embeddings a task needs.

    MediaSet    an image, clip or vector of each sample
    TextSet     every text of each sample; a sample may have several
    MeanSet     the mean of several views of each sample

Does not import torch at start-up: tasks are read before a model is loaded.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.sample import CorruptSampleError
from eval.datasets.datasets import EvaluationSet
from eval.datasets.views import media_view, modalities_of, read_contents
from pretrain.settings.views import View

if TYPE_CHECKING:
    from torch import Tensor

    from eval.embeddings.store import EmbeddingStore
    from eval.models.encoder import Encoder


@dataclass(frozen=True)
class ItemSet(ABC):
    """Items of a dataset; every sample has at least one."""

    dataset: EvaluationSet
    keys: list[str]  # [Q] keys of the samples

    @property
    @abstractmethod
    def views(self) -> tuple[str, ...]:
        """Views of a sample that the items show."""

    @property
    def name(self) -> str:
        """Name in metrics and messages, such as `image` or `text_title`."""
        return "_and_".join(view.replace(".", "_") for view in self.views)

    @property
    def kinds(self) -> set[str]:
        """Kinds of the modalities that the items show."""
        modalities = modalities_of(self.dataset)
        return {modalities[View.parse(view).member].kind for view in self.views}

    @property
    def owners(self) -> np.ndarray:
        """Sample of each item: int64 [items]."""
        return np.arange(len(self.keys))

    def items_of(self, sample: int) -> range:
        """Returns the items of a sample."""
        return range(sample, sample + 1)

    def check(self, encoder: Encoder) -> None:
        """Checks that a model has a tower for every view.

        Raises:
            InputError: if a tower is missing, or of another kind or width.
        """
        from eval.models.encoder import check_view

        for view in self.views:
            modality = modalities_of(self.dataset)[View.parse(view).member]
            check_view(encoder, view, modality, folder=self.dataset.folder)

    @abstractmethod
    def encode(self, store: EmbeddingStore) -> None:
        """Computes this process's share of the missing embeddings.

        Raises:
            InputError: see `EmbeddingStore`.
        """

    @abstractmethod
    def embeddings(self, store: EmbeddingStore, *, num_dims: int | None = None) -> Tensor:
        """Returns the embeddings: [items, D] L2-normalised float32, on the CPU.

        Args:
            store: cache of the embeddings.
            num_dims: number of first elements to return, normalised again; None: all.

        Raises:
            InputError: see `EmbeddingStore`.
        """

    @abstractmethod
    def digest(self, item: int) -> bytes:
        """Returns a digest of an item's content; it is equal for equal bytes.

        Raises:
            InputError: if the item cannot be read.
        """


@dataclass(frozen=True)
class MediaSet(ItemSet):
    """An image, clip or vector of each sample."""

    view: str | None = None  # None: the dataset's images or audio clips

    @property
    def views(self) -> tuple[str, ...]:
        return (self.view or media_view(self.dataset),)

    @property
    def member(self) -> str:
        """Modality of the dataset."""
        return View.parse(self.views[0]).member

    def encode(self, store: EmbeddingStore) -> None:
        store.encode_media(self.dataset, self.keys, view=self.view)

    def embeddings(self, store: EmbeddingStore, *, num_dims: int | None = None) -> Tensor:
        from eval.models.loaded_model import first_numbers

        return first_numbers(store.media(self.dataset, self.keys, view=self.view), num_dims)

    def digest(self, item: int) -> bytes:
        try:
            contents = read_contents(self.dataset, item, members=[self.member])
        except (CorruptSampleError, OSError) as error:
            raise InputError(str(error)) from None
        vector = contents.vectors.get(self.member)
        found = contents.media[self.member] if vector is None else vector.tobytes()
        return hashlib.sha256(found).digest()


@dataclass(frozen=True)
class TextSet(ItemSet):
    """Every text of each sample."""

    view: str
    texts: list[str]  # [M]
    samples: np.ndarray  # int64 [M], ascending: sample of each text

    @property
    def views(self) -> tuple[str, ...]:
        return (self.view,)

    @property
    def modality(self) -> str:
        """Modality of the model."""
        return View.parse(self.view).modality

    @property
    def owners(self) -> np.ndarray:
        return self.samples

    def items_of(self, sample: int) -> range:
        return range(*np.searchsorted(self.samples, [sample, sample + 1]).tolist())

    @property
    def num_texts(self) -> list[int]:
        """[Q] number of texts of each sample."""
        return np.bincount(self.samples, minlength=len(self.keys)).tolist()

    def encode(self, store: EmbeddingStore) -> None:
        name = f"{self.view} of {self.dataset.folder}"
        store.encode_texts(self.texts, name=name, modality=self.modality)

    def embeddings(self, store: EmbeddingStore, *, num_dims: int | None = None) -> Tensor:
        from eval.models.loaded_model import first_numbers

        return first_numbers(store.texts(self.texts, modality=self.modality), num_dims)

    def digest(self, item: int) -> bytes:
        return hashlib.sha256(self.texts[item].encode()).digest()


@dataclass(frozen=True)
class MeanSet(ItemSet):
    """The mean of several views of each sample: one item per sample.

    The texts of a sample are averaged first. Means of embeddings are normalised again.
    """

    parts: tuple[MediaSet | TextSet, ...]

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(view for part in self.parts for view in part.views)

    def encode(self, store: EmbeddingStore) -> None:
        for part in self.parts:
            part.encode(store)

    def embeddings(self, store: EmbeddingStore, *, num_dims: int | None = None) -> Tensor:
        import torch

        from eval.models.encoder import means_of_items

        found = []
        for part in self.parts:
            embeddings = part.embeddings(store, num_dims=num_dims)
            if isinstance(part, TextSet):
                embeddings = means_of_items(embeddings, part.num_texts)
            found.append(embeddings)
        rows = torch.stack(found, dim=1).flatten(0, 1)  # [Q, parts, D] -> [Q * parts, D]
        return means_of_items(rows, [len(found)] * len(self.keys))

    def digest(self, item: int) -> bytes:
        whole = hashlib.sha256()
        for part in self.parts:
            for own in part.items_of(item):
                whole.update(part.digest(own))
            whole.update(b"|")
        return whole.digest()


def read_items(dataset: EvaluationSet, keys: list[str], view: str) -> MediaSet | TextSet:
    """Reads the items of a view; the texts of every sample are read.

    Args:
        dataset: samples that have the view.
        keys: [Q] keys of the samples.
        view: name of the view.

    Raises:
        InputError: if a text cannot be read.
    """
    member = View.parse(view).member
    if modalities_of(dataset)[member].kind != "text":
        return MediaSet(dataset, keys, view)
    texts: list[str] = []
    samples: list[int] = []
    for ordinal in range(len(keys)):
        try:
            own = read_contents(dataset, ordinal, members=[member]).texts[member]
        except (CorruptSampleError, OSError) as error:
            raise InputError(str(error)) from None
        texts += own
        samples += [ordinal] * len(own)
    return TextSet(dataset, keys, view, texts, np.array(samples, dtype=np.int64))


def read_samples(dataset: EvaluationSet, keys: list[str], views: Sequence[str]) -> ItemSet:
    """Reads one item per sample: its only view, or the mean of several.

    Arguments and errors are those of `read_items`.
    """
    parts = tuple(read_items(dataset, keys, view) for view in views)
    if len(parts) == 1 and isinstance(parts[0], MediaSet):
        return parts[0]
    return MeanSet(dataset, keys, parts)
