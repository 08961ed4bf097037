"""Encodes the media items of a dataset, and texts, with a trained model.

Each media item is read, decoded, transformed (without randomness) and encoded once, in the order
of the dataset. A sample that cannot be decoded stops the evaluation: figures over the rest would
not be comparable with anybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_prep.config_file import InputError
from data_prep.media_decode import MediaError
from data_prep.shard_format import CorruptSampleError, Sample, media_extension_of, media_kind_of
from eval.ranking import check_finite
from eval.tasks import EvaluationSet
from pretrain.checkpoint import load_model


@dataclass(frozen=True)
class Encoder:
    """A model with its transforms and tokenizer, and how to feed it."""

    model: Any  # encode_media(kind, batch) and encode_text(tokens), each to [B, D]
    transforms: dict[str, Any]  # by media kind
    tokenizer: Callable[[list[str]], Tensor]  # M texts -> int64 [M, L]
    device: torch.device
    batch_size: int
    workers: int


def load_encoder(checkpoint: Path, *, batch_size: int, workers: int) -> Encoder:
    """The encoder of a checkpoint, on the GPU if there is one, in exact float32.

    Raises:
        InputError: the checkpoint is missing or damaged.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # TF32 rounds inputs to 10 bits, which reorders near ties.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    model, transforms, tokenizer = load_model(checkpoint, device=device)
    return Encoder(model, transforms, tokenizer, torch.device(device), batch_size, workers)


def encode_media(encoder: Encoder, dataset: EvaluationSet) -> Tensor:
    """[Q, D] L2-normalised float32 embeddings of a dataset's media, on the CPU, in its order.

    Raises:
        InputError: the model has no tower for this kind of media, or a sample cannot be decoded or
            embedded; names shard and key.
    """
    kind = dataset.info.media
    check_tower(encoder, kind, folder=dataset.folder)
    loader = DataLoader(
        _TransformedMedia(dataset, encoder.transforms[kind]),
        batch_size=encoder.batch_size,
        num_workers=encoder.workers,
        collate_fn=list,
    )
    batches = [
        encode_media_batch(encoder, kind, _stack(batch))
        for batch in tqdm(loader, desc=f"encoding {dataset.folder}", unit="batch", disable=None)
    ]
    embeddings = torch.cat(batches)  # -> [Q, D]
    check_embeddings(embeddings, name=str(dataset.folder))
    return embeddings


def check_tower(encoder: Encoder, kind: str, *, folder: Path) -> None:
    """
    Raises:
        InputError: the model has no tower for the kind of media that a dataset's folder holds.
    """
    if kind not in encoder.transforms:
        raise InputError(
            f"{folder} holds {kind}, but the model has towers for {sorted(encoder.transforms)} only"
        )


def encode_texts(encoder: Encoder, texts: Sequence[str], *, name: str) -> Tensor:
    """[M, D] L2-normalised float32 embeddings of texts, on the CPU.

    Args:
        encoder: the model and its tokenizer.
        texts: M texts.
        name: what they are, for the progress bar and errors.

    Raises:
        InputError: an embedding is not finite.
    """
    starts = range(0, len(texts), encoder.batch_size)
    batches = [
        encode_text_batch(encoder, texts[start : start + encoder.batch_size])
        for start in tqdm(starts, desc=f"encoding {name}", unit="batch", disable=None)
    ]
    embeddings = torch.cat(batches)  # -> [M, D]
    check_embeddings(embeddings, name=name)
    return embeddings


def check_embeddings(embeddings: Tensor, *, name: str) -> None:
    """
    Raises:
        InputError: an embedding is not finite, naming what was embedded and the first bad row.
    """
    try:
        check_finite(embeddings, name=name)
    except ValueError as error:
        raise InputError(str(error)) from None


class _TransformedMedia(torch.utils.data.Dataset):
    """Ordinal -> transformed media, or the error to raise: one raised in a worker process would
    come with the worker's traceback as its message."""

    def __init__(self, dataset: EvaluationSet, transform: Any) -> None:
        self.dataset = dataset
        self.transform = transform
        kind = dataset.info.media
        self.fields = [name for name in dataset.info.fields if media_kind_of(name) == kind]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ordinal: int) -> Tensor | InputError:
        try:
            sample = self.dataset.read_sample(ordinal, fields=self.fields)
            return transformed_media(sample, self.transform, kind=self.dataset.info.media)
        except CorruptSampleError as error:
            return InputError(
                f"{error}; evaluation skips nothing: repair the sample, or evaluate a subset "
                "without it"
            )
        except OSError as error:
            return InputError(str(error))


def transformed_media(sample: Sample, transform: Any, *, kind: str) -> Tensor:
    """The sample's image [3, H, Wd] or waveform [samples], as the model's tower expects it.

    Raises:
        CorruptSampleError: it has no media of this kind, or they cannot be decoded.
    """
    extension = media_extension_of(sample.members, kind)
    if extension is None:
        raise CorruptSampleError(f"{sample}: holds no {kind}")
    try:
        decoded = transform.decode(sample.members[extension], extension)
    except MediaError as error:
        raise CorruptSampleError(f"{sample}: .{extension} cannot be decoded: {error}") from None
    return transform(decoded)


def _stack(batch: list[Tensor | InputError]) -> Tensor:
    for transformed in batch:
        if isinstance(transformed, InputError):
            raise transformed
    return torch.stack(batch)  # -> [B, 3, H, Wd] or [B, samples]


def encode_media_batch(encoder: Encoder, kind: str, media: Tensor) -> Tensor:
    """[B, D] L2-normalised float32 embeddings, on the CPU, of transformed media.

    Args:
        encoder: the model.
        kind: of media.
        media: [B, 3, H, Wd] or [B, samples].
    """
    with torch.inference_mode():
        return encoder.model.encode_media(kind, media.to(encoder.device)).float().cpu()


def encode_text_batch(encoder: Encoder, texts: Sequence[str]) -> Tensor:
    """[B, D] L2-normalised float32 embeddings, on the CPU, of B texts."""
    tokens = encoder.tokenizer(list(texts)).to(encoder.device)  # -> [B, L]
    with torch.inference_mode():
        return encoder.model.encode_text(tokens).float().cpu()
