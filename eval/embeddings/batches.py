"""Reads and prepares the media of an evaluation set, in worker processes if there are any."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data_prep.errors import InputError
from data_prep.shards.sample import (
    CorruptSampleError,
    media_kind_of,
)
from eval.datasets.datasets import EvaluationSet
from eval.models.preprocessing import FrontEnd


class MediaBatch(NamedTuple):
    """Some items, ready to be encoded."""

    windows: Tensor  # [n, ...]
    num_windows: list[int]  # of each item; n together


class _PreparedMedia(torch.utils.data.Dataset):
    """Ordinal -> prepared media, or the error to raise: one raised in a worker process would
    come with the worker's traceback as its message."""

    def __init__(self, dataset: EvaluationSet, front_end: FrontEnd) -> None:
        self.dataset = dataset
        self.front_end = front_end
        self.fields = [
            name for name in dataset.info.fields if media_kind_of(name) == front_end.kind
        ]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ordinal: int) -> Tensor | InputError:
        try:
            sample = self.dataset.read_sample(ordinal, fields=self.fields)
            return self.front_end.prepare(sample)
        except CorruptSampleError as error:
            return InputError(
                f"{error}; evaluation skips nothing: repair the sample, or evaluate a subset "
                "without it"
            )
        except OSError as error:
            return InputError(str(error))


def _joined(items: list[Tensor | InputError]) -> MediaBatch | InputError:
    error = next((item for item in items if isinstance(item, InputError)), None)
    if error is not None:
        return error
    # One tensor: each that a worker sends costs the main process an open file.
    return MediaBatch(torch.cat(items), [len(windows) for windows in items])


def media_batches(
    dataset: EvaluationSet, front_end: FrontEnd, batches: Sequence[Sequence[int]], *, workers: int
) -> Iterator[MediaBatch]:
    """The media of each batch of ordinals, in order.

    Raises:
        InputError: a sample cannot be read or decoded; names shard and key.
    """
    loader = DataLoader(
        _PreparedMedia(dataset, front_end),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_joined,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch
