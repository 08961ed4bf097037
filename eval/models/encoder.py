"""Encodes images, clips, vectors and texts with a trained model of any supported library.

Every batch has the same number of rows; the last one is padded. On a given device, an item's
embedding is therefore bitwise the same regardless of how many items are encoded together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_prep.config_file import read_stored_config
from data_prep.errors import InputError
from data_prep.modalities.modality import Kind, Modality, VectorShape
from eval.metrics.ranking import check_finite
from eval.models.encoding import EncodingConfig
from eval.models.loaded_model import LoadedModel, ModelOrigin, normalized
from eval.models.model_source import ModelSource, find_model
from eval.models.preprocessing import FrontEnd, MediaFrontEnd, VectorFrontEnd
from pretrain.checkpoint import find_checkpoint, load_model
from pretrain.checkpoints.record import CheckpointRecord, WeightsKind, read_record
from pretrain.config import PretrainConfig
from pretrain.settings.views import View


@dataclass(frozen=True)
class Encoder:
    """A model with its input preparation, device, precision and batch size."""

    model: Any  # encode(modality, *inputs) to [B, D]
    front_ends: dict[str, FrontEnd]  # image, audio or vector modality -> preparation
    tokenizer: Callable[[list[str]], Any] | None  # M texts -> input of encode; None: no texts
    origin: ModelOrigin
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    workers: int
    matryoshka_dims: tuple[int, ...] = ()  # see LoadedModel
    text_modalities: tuple[str, ...] = ("text",)
    trained_pairs: frozenset[frozenset[str]] | None = None  # see LoadedModel

    @property
    def kinds(self) -> dict[str, Kind]:
        """Kind of each modality."""
        media = {modality: each.kind for modality, each in self.front_ends.items()}
        return media | dict.fromkeys(self.text_modalities, "text")

    @cached_property
    def embed_dim(self) -> int:
        """Joint embedding width D."""
        if self.text_modalities:
            return self.encode_texts([""], modality=self.text_modalities[0]).shape[1]
        modality, front_end = next(iter(self.front_ends.items()))
        return self.encode_windows(modality, front_end.example()).shape[1]

    def encode_windows(self, modality: str, windows: Tensor) -> Tensor:
        """Encodes prepared windows.

        Args:
            modality: modality of the model.
            windows: [n, ...], prepared by the front end of this modality.

        Returns:
            [n, D] L2-normalised float32, on the CPU.
        """
        inputs = self.front_ends[modality].inputs
        return self._in_batches(
            windows, lambda batch: self.model.encode(modality, *inputs(batch.to(self.device)))
        )

    @property
    def items_at_once(self) -> int:
        """Number of items to prepare together, such that long clips take little memory."""
        return max(1, self.batch_size // 16)

    def encode_items(self, modality: str, windows: Tensor, num_windows: Sequence[int]) -> Tensor:
        """Encodes items of one or more windows each, as the normalised mean over their windows.

        Args:
            modality: modality of the model.
            windows: [n, ...] windows of the first item, then of the second, and so on.
            num_windows: [B] number of windows of each item; they sum to n.

        Returns:
            [B, D] L2-normalised float32, on the CPU.
        """
        return means_of_items(self.encode_windows(modality, windows), num_windows)

    def encode_texts(self, texts: Sequence[str], *, modality: str = "text") -> Tensor:
        """Encodes M texts: [M, D] L2-normalised float32, on the CPU."""
        return self._in_batches(
            list(texts),
            lambda batch: self.model.encode(modality, self.tokenizer(batch).to(self.device)),
        )

    def _in_batches(self, rows: Any, encode: Callable[[Any], Tensor]) -> Tensor:
        embeddings = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            num_rows = len(batch)
            with torch.inference_mode(), self.precision():
                found = encode(_padded(batch, self.batch_size))
            embeddings.append(found.float().cpu()[:num_rows])
        return torch.cat(embeddings)

    def precision(self) -> Any:
        """Returns a context in which the towers compute in `dtype`."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class ItemEncoder:
    """Encodes items as `Encoder.encode_items` does, but holds few prepared windows at a time.

    Windows wait until they fill a batch. The embeddings are the same for any grouping of items.

    Args:
        encoder: encoder of the model.
        modality: modality of the model.
    """

    def __init__(self, encoder: Encoder, modality: str) -> None:
        self.encoder = encoder
        self.modality = modality
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
        return means_of_items(torch.cat(self._embeddings), self.num_windows)

    def _encode(self, windows: Tensor) -> None:
        self._embeddings.append(self.encoder.encode_windows(self.modality, windows))


def means_of_items(embeddings: Tensor, num_rows: Sequence[int]) -> Tensor:
    """Computes the normalised mean over the rows of each item: [n, D] -> [items, D].

    An item of one row keeps it as it is.

    Args:
        embeddings: [n, D] L2-normalised rows of the first item, then of the second, and so on.
        num_rows: [items] number of rows of each item, at least 1; they sum to n.
    """
    if max(num_rows) == 1:
        return embeddings
    return torch.cat(
        [
            own if len(own) == 1 else normalized(own.mean(dim=0, keepdim=True))
            for own in embeddings.split(list(num_rows))
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
    source = find_model(
        config.checkpoint, architecture=config.open_clip_architecture, weights=config.weights
    )
    loaded = load_any_model(source)
    front_ends: dict[str, FrontEnd] = {
        modality: MediaFrontEnd(
            loaded.kinds[modality], transform, loaded.settings[modality], config.long_clips
        )
        for modality, transform in loaded.transforms.items()
    }
    for modality, shape in loaded.vector_shapes.items():
        front_ends[modality] = VectorFrontEnd(shape)
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
        trained_pairs=loaded.trained_pairs,
        text_modalities=tuple(name for name, kind in loaded.kinds.items() if kind == "text"),
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
    return _load_isopair(source.path, source.weights)


def _load_isopair(path: Path, weights: WeightsKind) -> LoadedModel:
    checkpoint = find_checkpoint(path, weights=weights)
    model, transforms, tokenizer = load_model(checkpoint, weights=weights)
    record = read_record(checkpoint)
    settings = {
        modality: transform.config.model_dump(mode="json")
        for modality, transform in transforms.items()
    }
    shapes = {
        modality: model.towers[model.tower_names[modality]].input_stage.shape
        for modality, kind in model.kinds.items()
        if kind == "vector"
    }
    origin = ModelOrigin(
        "isopair",
        checkpoint,
        record.sha256_of(weights),
        record.state.step,
        tuple(record.state.tags),
        weights,
    )
    config = _stored_config(checkpoint, record)
    return LoadedModel(
        model,
        model.kinds,
        transforms,
        settings,
        tokenizer,
        origin,
        vector_shapes=shapes,
        matryoshka_dims=() if config is None else tuple(config.matryoshka_dims),
        trained_pairs=None if config is None else _trained_pairs(config),
    )


def _trained_pairs(config: PretrainConfig) -> frozenset[frozenset[str]]:
    """Returns the pairs of modalities whose embeddings some objective of a run reads together.

    Objectives with a projection of their own, and those that read tokens, do not read the
    embeddings that are evaluated.
    """
    read = [
        [View.parse(view).modality for view in section.views(key.partition("/")[2])]
        for key, section in config.objectives.items()
        if not (section.projects or section.reads_tokens)
    ]
    return frozenset(frozenset(pair) for modalities in read for pair in combinations(modalities, 2))


def _stored_config(checkpoint: Path, record: CheckpointRecord) -> PretrainConfig | None:
    """Returns the config of the run; None for a checkpoint that holds none."""
    if "config.yaml" not in record.files:
        return None
    return read_stored_config(PretrainConfig, checkpoint / "config.yaml")


def check_view(encoder: Encoder, view: str, modality: Modality, *, folder: Path) -> None:
    """Checks that a model can encode a view of a dataset.

    Args:
        encoder: encoder of the model.
        view: name of the view.
        modality: modality of the dataset that the view shows.
        folder: folder of the dataset, for the message.

    Raises:
        InputError: if the model has no tower for it, or one of another kind or width.
    """
    wanted, kind = View.parse(view), encoder.kinds.get(View.parse(view).modality)
    if kind is None:
        towers = sorted(encoder.kinds if modality.kind == "text" else encoder.front_ends)
        raise InputError(
            f"{folder} contains {wanted.member}, but the model has towers for {towers}"
        )
    if kind != modality.kind:
        raise InputError(
            f"{folder}: expected {wanted.member!r} of kind {kind}, which the view {view!r} shows; "
            f"found kind {modality.kind}"
        )
    if isinstance(front_end := encoder.front_ends.get(wanted.modality), VectorFrontEnd):
        found = VectorShape(modality.width, is_sequence=modality.is_sequence)
        if found != front_end.vector_shape:
            raise InputError(
                f"{folder}: expected vectors {wanted.member!r} of shape {front_end.vector_shape}, "
                f"as the model encodes, found {found}"
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
