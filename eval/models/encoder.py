"""Encodes media and texts with a trained model of any supported library.

Every batch has the same number of rows; the last one is padded. On a given device, an item's
embedding is therefore bitwise the same regardless of how many items are encoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.config_file import read_stored_config
from data_prep.errors import InputError
from eval.metrics.ranking import check_finite
from eval.models.encoding import EncodingConfig
from eval.models.loaded_model import LoadedModel, ModelOrigin, normalized
from eval.models.model_source import ModelSource, find_model
from eval.models.preprocessing import FrontEnd
from pretrain.checkpoint import find_checkpoint, load_model
from pretrain.checkpoints.record import read_record
from pretrain.config import PretrainConfig


@dataclass(frozen=True)
class Encoder:
    """A model with its input preparation, device, precision and batch size."""

    model: Any  # encode_media(kind, batch) and encode_text(tokens), each to [B, D]
    front_ends: dict[str, FrontEnd]  # kind of media -> preparation
    tokenizer: Callable[[list[str]], Any]  # M texts -> input of encode_text
    origin: ModelOrigin
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    workers: int
    matryoshka_dims: tuple[int, ...] = ()  # see LoadedModel

    @cached_property
    def embed_dim(self) -> int:
        """Joint embedding width D."""
        return self.encode_texts([""]).shape[1]

    def encode_windows(self, kind: str, windows: Tensor) -> Tensor:
        """Encodes prepared windows.

        Args:
            kind: kind of media.
            windows: [n, ...], prepared by the front end of this kind of media.

        Returns:
            [n, D] L2-normalised float32, on the CPU.
        """
        return self._in_batches(
            windows, lambda batch: self.model.encode_media(kind, batch.to(self.device))
        )

    @property
    def items_at_once(self) -> int:
        """Number of items to prepare together, such that long clips take little memory."""
        return max(1, self.batch_size // 16)

    def encode_items(self, kind: str, windows: Tensor, num_windows: Sequence[int]) -> Tensor:
        """Encodes items of one or more windows each, as the normalised mean over their windows.

        Args:
            kind: kind of media.
            windows: [n, ...] windows of the first item, then of the second, and so on.
            num_windows: [B] number of windows of each item; they sum to n.

        Returns:
            [B, D] L2-normalised float32, on the CPU.
        """
        return _means_of_items(self.encode_windows(kind, windows), num_windows)

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Encodes M texts: [M, D] L2-normalised float32, on the CPU."""
        return self._in_batches(
            list(texts),
            lambda batch: self.model.encode_text(self.tokenizer(batch).to(self.device)),
        )

    def _in_batches(self, rows: Any, encode: Callable[[Any], Tensor]) -> Tensor:
        embeddings = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            num_rows = len(batch)
            with torch.inference_mode(), self._precision():
                found = encode(_padded(batch, self.batch_size))
            embeddings.append(found.float().cpu()[:num_rows])
        return torch.cat(embeddings)

    def _precision(self) -> Any:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class ItemEncoder:
    """Encodes items as `Encoder.encode_items` does, but holds few prepared windows at a time.

    Windows wait until they fill a batch. The embeddings are the same for any grouping of items.

    Args:
        encoder: encoder of the model.
        kind: kind of media.
    """

    def __init__(self, encoder: Encoder, kind: str) -> None:
        self.encoder = encoder
        self.kind = kind
        self.num_windows: list[int] = []  # of each item
        self._waiting: list[Tensor] = []
        self._num_waiting = 0
        self._embeddings: list[Tensor] = []

    def add(self, windows: Tensor, num_windows: Sequence[int]) -> None:
        """Adds items, and encodes the windows that fill a batch.

        Args:
            windows: [n, ...] windows of the first item, then of the second, and so on.
            num_windows: number of windows of each item; they sum to n.
        """
        self.num_windows += num_windows
        size = self.encoder.batch_size
        for part in windows.split(size):
            self._waiting.append(part)
            self._num_waiting += len(part)
            if self._num_waiting >= size:
                together = torch.cat(self._waiting)
                self._encode(together[:size])
                self._waiting = [together[size:].clone()]  # a copy, which frees the rest
                self._num_waiting -= size

    def finish(self) -> Tensor:
        """Encodes the remaining windows, and returns the embeddings of all items: [items, D].

        At least one item must have been added.
        """
        if self._num_waiting:
            self._encode(torch.cat(self._waiting))
        self._waiting, self._num_waiting = [], 0
        return _means_of_items(torch.cat(self._embeddings), self.num_windows)

    def _encode(self, windows: Tensor) -> None:
        self._embeddings.append(self.encoder.encode_windows(self.kind, windows))


def _means_of_items(embeddings: Tensor, num_windows: Sequence[int]) -> Tensor:
    """Computes the normalised mean over the windows of each item: [n, D] -> [items, D]."""
    if max(num_windows) == 1:
        return embeddings
    return torch.cat(
        [
            own if len(own) == 1 else normalized(own.mean(dim=0, keepdim=True))
            for own in embeddings.split(list(num_windows))
        ]
    )


def _padded(batch: Any, num_rows: int) -> Any:
    """Pads a batch to `num_rows` with copies of its last row."""
    missing = num_rows - len(batch)
    if not missing:
        return batch
    if isinstance(batch, Tensor):
        return torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
    return batch + batch[-1:] * missing


def load_encoder(config: EncodingConfig) -> Encoder:
    """Loads the encoder of a model, on the GPU if there is one.

    Raises:
        InputError: if the model is missing or damaged.
    """
    # The current device, because each process has its own GPU.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # TF32 rounds inputs to 10 mantissa bits, which reorders near-ties.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    source = find_model(config.checkpoint, architecture=config.open_clip_architecture)
    loaded = load_any_model(source)
    front_ends = {
        kind: FrontEnd(kind, transform, loaded.settings[kind], config.long_clips)
        for kind, transform in loaded.transforms.items()
    }
    return Encoder(
        model=loaded.model.to(device).eval().requires_grad_(False),
        front_ends=front_ends,
        tokenizer=loaded.tokenizer,
        origin=loaded.origin,
        device=device,
        dtype=getattr(torch, config.dtype),
        batch_size=config.batch_size,
        workers=config.workers,
        matryoshka_dims=loaded.matryoshka_dims,
    )


def load_any_model(source: ModelSource) -> LoadedModel:
    """Loads a model with the library that it was saved by.

    Raises:
        InputError: if the model is damaged, or the library cannot load it.
    """
    # Imported here because each library takes seconds to load.
    if source.library == "open_clip":
        from eval.models.open_clip_model import load_open_clip

        return load_open_clip(source)
    if source.library == "hugging_face":
        from eval.models.hugging_face_model import load_hugging_face

        return load_hugging_face(source)
    return _load_isopair(source.path)


def _load_isopair(path: Path) -> LoadedModel:
    checkpoint = find_checkpoint(path)
    model, transforms, tokenizer = load_model(checkpoint)
    record = read_record(checkpoint)
    settings = {
        kind: transform.config.model_dump(mode="json") for kind, transform in transforms.items()
    }
    origin = ModelOrigin(
        "isopair", checkpoint, record.model_sha256, record.state.step, tuple(record.state.tags)
    )
    config = read_stored_config(PretrainConfig, checkpoint / "config.yaml")
    dims = tuple(config.matryoshka_dims)
    return LoadedModel(model, transforms, settings, tokenizer, origin, matryoshka_dims=dims)


def check_tower(encoder: Encoder, kind: str, *, folder: Path) -> None:
    """Checks that a model can encode a dataset's kind of media.

    Raises:
        InputError: if the model has no tower for this kind.
    """
    if kind not in encoder.front_ends:
        raise InputError(
            f"{folder} contains {kind}, but the model has towers for {sorted(encoder.front_ends)}"
        )


def check_embeddings(embeddings: Tensor, *, name: str) -> None:
    """Checks that all embeddings are finite.

    Raises:
        InputError: if an embedding is not finite; the message gives `name` and the first bad row.
    """
    try:
        check_finite(embeddings, name=name)
    except ValueError as error:
        raise InputError(str(error)) from None
