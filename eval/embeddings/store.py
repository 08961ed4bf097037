"""On-disk cache of the embeddings of evaluation sets and texts, filled by all processes.

    <folder>/<name>_<hash>/origin.json    everything that the embeddings depend on
    <folder>/<name>_<hash>/00000003.npy   float32 [items of the part, D], L2-normalised: the fourth
                                          part of the items, which are sorted by key

Parts are distributed over the processes, and later jobs reuse finished parts. Items are encoded in
the order of their keys, and equal texts only once. Metrics are therefore identical to the last
digit for any sharding, order of shards, and number of processes or workers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data_prep.storage.atomic import write_atomically
from data_prep.storage.file_names import readable_part
from eval.datasets.datasets import EvaluationSet
from eval.datasets.views import media_view, modalities_of
from eval.embeddings.batches import media_batches
from eval.embeddings.parts import Parts
from eval.models.encoder import Encoder, ItemEncoder, check_embeddings, check_view
from eval.models.loaded_model import encoding_packages
from pretrain.settings.views import View

MAX_PARTS = 1024  # parts of a set; a failure loses at most the part in progress


class EmbeddingStore:
    """Cache of one encoder's embeddings of evaluation sets and texts.

    Args:
        folder: cache folder; several sets, encoders and jobs may share it.
        encoder: encoder that computes missing embeddings.
    """

    def __init__(self, folder: Path, encoder: Encoder) -> None:
        self.folder = folder
        self.encoder = encoder
        self.packages = encoding_packages()

    def encode_media(
        self, dataset: EvaluationSet, keys: Sequence[str], *, view: str | None = None
    ) -> None:
        """Encodes this process's share of the missing images, clips or vectors.

        Args:
            dataset: evaluation set of Q samples that have the view.
            keys: [Q] sample keys.
            view: view to encode; None: the dataset's images or audio clips.

        Raises:
            InputError: if the model has no tower for this view, a sample cannot be decoded, or an
                embedding is not finite.
        """
        view = view or media_view(dataset)
        shown = View.parse(view)
        modality = modalities_of(dataset)[shown.member]
        check_view(self.encoder, view, modality, folder=dataset.folder)
        parts = self._media_parts(dataset, view)
        order = _order_of(keys)
        missing = parts.own_missing()
        wanted = [(part, order[parts.items(part)]) for part in missing]
        front_end = self.encoder.front_ends[shown.modality]
        is_audio = front_end.kind == "audio"
        size = self.encoder.items_at_once if is_audio else self.encoder.batch_size
        batches = [
            ordinals[start : start + size].tolist()
            for _, ordinals in wanted
            for start in range(0, len(ordinals), size)
        ]
        workers = self.encoder.workers
        prepared = media_batches(dataset, front_end, batches, member=shown.member, workers=workers)
        progress = iter(_shown(prepared, f"encoding {dataset.folder}", total=len(batches)))
        for part, ordinals in wanted:
            items = ItemEncoder(self.encoder, shown.modality)
            for _ in range(0, len(ordinals), size):
                items.add(*next(progress))
            embeddings = items.finish()
            check_embeddings(embeddings, name=str(dataset.folder))
            parts.write(part, embeddings)

    def media(
        self, dataset: EvaluationSet, keys: Sequence[str], *, view: str | None = None
    ) -> Tensor:
        """Reads the embeddings of a dataset's images, clips or vectors, in dataset order.

        Args:
            dataset: evaluation set of Q samples that have the view.
            keys: [Q] sample keys.
            view: encoded view; None: the dataset's images or audio clips.

        Returns:
            [Q, D] L2-normalised float32, on the CPU.

        Raises:
            InputError: if a part is missing or damaged.
        """
        return _in_order(self._media_parts(dataset, view).read(), _order_of(keys))

    def encode_texts(self, texts: Sequence[str], *, name: str, modality: str = "text") -> None:
        """Encodes this process's share of the missing texts.

        Args:
            texts: M texts.
            name: description of the texts, shown in messages.
            modality: modality of the model that encodes them.

        Raises:
            InputError: if an embedding is not finite.
        """
        distinct = sorted(set(texts))
        parts = self._text_parts(distinct, modality)
        for part in _shown(parts.own_missing(), f"encoding {name}"):
            items = parts.items(part)
            own = distinct[items.start : items.stop]
            embeddings = self.encoder.encode_texts(own, modality=modality)
            check_embeddings(embeddings, name=name)
            parts.write(part, embeddings)

    def texts(self, texts: Sequence[str], *, modality: str = "text") -> Tensor:
        """Reads the embeddings of M texts: [M, D] L2-normalised float32, on the CPU.

        Args:
            texts: M texts.
            modality: modality of the model that encodes them.

        Raises:
            InputError: if a part is missing or damaged.
        """
        distinct = sorted(set(texts))
        index_of = {text: index for index, text in enumerate(distinct)}
        parts = self._text_parts(distinct, modality)
        return parts.read()[[index_of[text] for text in texts]]

    def _media_parts(self, dataset: EvaluationSet, view: str | None = None) -> Parts:
        view = view or media_view(dataset)
        front_end = self.encoder.front_ends[View.parse(view).modality]
        origin = {
            "media": view,
            "dataset_fingerprint": dataset.fingerprint,
            "transform": front_end.settings,
            "long_clips": front_end.long_clips if front_end.kind == "audio" else None,
        }
        return self._parts(dataset.folder.name, origin, len(dataset))

    def _text_parts(self, distinct: Sequence[str], modality: str = "text") -> Parts:
        origin = {"texts_sha256": checksum_of_texts(distinct)}
        origin |= {} if modality == "text" else {"modality": modality}
        return self._parts("texts", origin, len(distinct))

    def _parts(self, name: str, origin: dict[str, Any], num_items: int) -> Parts:
        encoder = self.encoder
        origin |= {
            "model_sha256": encoder.origin.sha256,
            "model_settings": dict(encoder.origin.settings),
            "packages": self.packages,
            "dtype": str(encoder.dtype).removeprefix("torch."),
            "device": encoder.device.type,
            "batch_size": encoder.batch_size,
        }
        content = json.dumps(origin, indent=1, sort_keys=True).encode() + b"\n"
        folder = self.folder / f"{readable_part(name)}_{hashlib.sha256(content).hexdigest()[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "origin.json").exists():
            write_atomically(folder / "origin.json", content)
        batches_per_part = math.ceil(num_items / encoder.batch_size / MAX_PARTS)
        part_size = batches_per_part * encoder.batch_size
        return Parts(folder, num_items, part_size, encoder.embed_dim)


def checksum_of_texts(texts: Iterable[str]) -> str:
    """Computes the SHA-256 of a sequence of texts."""
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def checksum_of_arrays(*arrays: np.ndarray) -> str:
    """Computes the SHA-256 of arrays of integers or booleans."""
    return hashlib.sha256(json.dumps([array.tolist() for array in arrays]).encode()).hexdigest()


def _order_of(keys: Sequence[str]) -> np.ndarray:
    """Returns the indices that sort items by key: int64 [Q]."""
    return np.argsort(np.array(keys), kind="stable")


def _in_order(values: Tensor, order: np.ndarray) -> Tensor:
    """Undoes a sort: moves row i to row order[i]."""
    found = torch.empty_like(values)
    found[torch.from_numpy(order)] = values
    return found


def _shown(items: Iterable[Any], what: str, *, total: int | None = None) -> Iterator[Any]:
    return tqdm(items, desc=what, total=total, unit="batch", disable=None)
