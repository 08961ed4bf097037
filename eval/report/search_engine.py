"""Nearest-neighbour search among the views of a dataset's samples."""

from __future__ import annotations

import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath
from threading import Lock
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.modalities.modality import Kind
from data_prep.modalities.vectors import VectorError, to_npy
from data_prep.shards.sample import CorruptSampleError, media_kind_of
from data_prep.shards.subset import KeptSamples
from eval.datasets.datasets import EvaluationSet
from eval.datasets.views import modalities_of, read_contents
from eval.embeddings.items import ItemSet
from eval.models.encoder import Encoder
from pretrain.settings.views import View

MAX_NUMBERS = 64  # numbers of a vector that the page draws
VECTOR_EXTENSION = "npy"


@dataclass(frozen=True)
class ViewIndex:
    """Items of one view, and the index of their embeddings."""

    items: ItemSet  # of a dataset, or of its samples that have the view
    index: Any  # faiss index, in the order of the items

    @property
    def view(self) -> str:
        """Name of the view."""
        return self.items.views[0]

    @property
    def member(self) -> str:
        """Modality of the dataset."""
        return View.parse(self.view).member

    @cached_property
    def samples(self) -> np.ndarray:
        """Sample of each item, as a number in the whole dataset: int64 [items]."""
        owners, dataset = self.items.owners, self.items.dataset
        return dataset.ordinals_of(owners) if isinstance(dataset, KeptSamples) else owners


class SearchEngine:
    """Nearest-neighbour search among the views of a dataset.

    Args:
        dataset: dataset whose views are indexed.
        encoder: encoder that computed the indexed embeddings.
        indexes: indexed views, in the order of the results.
        num_results: number of results of each view.
    """

    def __init__(
        self,
        dataset: EvaluationSet,
        encoder: Encoder,
        indexes: Sequence[ViewIndex],
        *,
        num_results: int,
    ) -> None:
        self.dataset = dataset
        self.encoder = encoder
        self.indexes = {each.view: each for each in indexes}
        self.num_results = num_results
        self._turn = Lock()  # one request is encoded at a time

    @property
    def num_samples(self) -> int:
        """Number of samples of the whole dataset."""
        is_kept = isinstance(self.dataset, KeptSamples)
        return len(self.dataset.dataset if is_kept else self.dataset)

    def by_text(self, text: str, *, modality: str | None = None) -> list[dict[str, Any]]:
        """Finds the items nearest to a text.

        Args:
            text: query.
            modality: modality of the model that encodes it; None: its first text.

        Raises:
            InputError: if the model has no such modality for texts.
        """
        chosen = self._modality_for("text", modality, what="a text")
        with self._turn:
            query = self.encoder.encode_texts([text], modality=chosen)
        return self._nearest(query.numpy())

    def by_file(
        self, content: bytes, name: str, *, modality: str | None = None
    ) -> list[dict[str, Any]]:
        """Finds the items nearest to an image, a sound or a vector.

        Args:
            content: bytes of the file.
            name: name of the file; its extension selects the decoder.
            modality: modality of the model that encodes it; None: the first of this kind.

        Raises:
            InputError: if the file cannot be decoded, or the model has no tower for it.
        """
        extension = PurePosixPath(name).suffix[1:].lower()
        kind = "vector" if extension == VECTOR_EXTENSION else media_kind_of(extension)
        known = sorted({each.kind for each in self.encoder.front_ends.values()})
        if kind not in known:
            raise InputError(f"{name}: expected {' and '.join(known)}, found .{extension}")
        chosen = self._modality_for(kind, modality, what=name)
        try:
            windows = self.encoder.front_ends[chosen].prepare_file(content, extension)
        except (MediaError, VectorError) as error:
            raise InputError(f"{name}: cannot be decoded: {error}") from None
        with self._turn:
            query = self.encoder.encode_items(chosen, windows, [len(windows)])
        return self._nearest(query.numpy())

    def like(self, view: str, item: int) -> list[dict[str, Any]]:
        """Finds the items nearest to an indexed item, which comes first in its own view."""
        return self._nearest(self.indexes[view].index.reconstruct(item)[None])

    def content(self, ordinal: int, member: str) -> tuple[bytes, str]:
        """Reads (content, MIME type) of an image, clip or vector of a sample.

        Raises:
            CorruptSampleError: if the sample is damaged, or lacks the modality.
        """
        contents = self._read(ordinal, [member])
        if member in contents.vectors:
            return to_npy(contents.vectors[member]), "application/octet-stream"
        if member not in contents.media:
            raise CorruptSampleError(f"{contents}: contains no {member}")
        extension = contents.extensions[member]
        unknown = f"{modalities_of(self.dataset)[member].kind}/{extension}"
        return contents.media[member], mimetypes.types_map.get(f".{extension}", unknown)

    def _modality_for(self, kind: Kind, wanted: str | None, *, what: str) -> str:
        fitting = [name for name, own in self.encoder.kinds.items() if own == kind]
        if not fitting or wanted not in (None, *fitting):
            found = f"{wanted!r}" if wanted else f"towers for {sorted(self.encoder.kinds)}"
            raise InputError(
                f"{what}: expected a modality of kind {kind} ({', '.join(fitting) or 'none'}), "
                f"found {found}"
            )
        return wanted or fitting[0]

    def _nearest(self, query: np.ndarray) -> list[dict[str, Any]]:
        """Returns the nearest items of every view, best first within a view."""
        found = []
        for view, own in self.indexes.items():
            num_results = min(self.num_results, own.index.ntotal)
            scores, items = own.index.search(query, num_results)
            found += [
                self._described(view, item, score)
                for item, score in zip(items[0].tolist(), scores[0].tolist(), strict=True)
                if item >= 0  # an approximate index may find fewer
            ]
        return found

    def _described(self, view: str, item: int, score: float) -> dict[str, Any]:
        own = self.indexes[view]
        ordinal = int(own.samples[item])
        key, parts = self._parts_of(ordinal)
        kind = modalities_of(self.dataset)[own.member].kind
        if kind == "text":  # only the text that was found, of several
            parts = [part for part in parts if part["member"] != own.member]
            parts.append({"member": own.member, "kind": kind, "texts": [own.items.texts[item]]})
        return {
            "view": view,
            "item": item,
            "ordinal": ordinal,
            "key": key,
            "score": score,
            "member": own.member,
            "kind": kind,
            "captions": [
                text
                for part in parts
                if part["kind"] == "text" and part["member"] != own.member
                for text in part["texts"]
            ],
            "parts": sorted(parts, key=lambda part: part["member"] != own.member),
        }

    def _parts_of(self, ordinal: int) -> tuple[str, list[dict[str, Any]]]:
        """Returns (key, what the page shows of each modality) of a sample; no media are read."""
        modalities = modalities_of(self.dataset)
        present = self._present(ordinal)
        small = [name for name in present if name not in modalities.media]
        try:
            contents = self._read(ordinal, small)
        except InputError:  # a classification set has no captions
            contents = self._read(ordinal, [name for name in small if name != "text"])
        parts: list[dict[str, Any]] = []
        for name in present:
            part: dict[str, Any] = {"member": name, "kind": modalities[name].kind}
            if name in contents.texts:
                parts.append(part | {"texts": contents.texts[name]})
            elif name in contents.vectors:
                vector = contents.vectors[name]
                numbers = vector.ravel()[:MAX_NUMBERS].tolist()
                parts.append(part | {"shape": list(vector.shape), "numbers": numbers})
            elif name in modalities.media:
                parts.append(part)
        return contents.key, parts

    def _present(self, ordinal: int) -> tuple[str, ...]:
        if not isinstance(self.dataset, KeptSamples):
            return tuple(modalities_of(self.dataset))
        dataset = self.dataset.dataset
        shard, position = dataset.locate(ordinal)
        return dataset.modalities.names_in(int(dataset.presence(shard)[position]))

    def _read(self, ordinal: int, members: Sequence[str]) -> Any:
        if isinstance(self.dataset, KeptSamples):
            return self.dataset.dataset.read_modalities(ordinal, names=members)
        return read_contents(self.dataset, ordinal, members=members)
