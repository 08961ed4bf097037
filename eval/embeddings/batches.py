"""Reads and prepares batches of an evaluation set's media, optionally in worker processes."""

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
    """Prepared windows of a batch of items."""

    windows: Tensor  # [n, ...] windows of the first item, then of the second, and so on
    num_windows: list[int]  # number of windows of each item; they sum to n


class _PreparedMedia(torch.utils.data.Dataset):
    """Map from ordinal to prepared media, or to an error for the main process to raise.

    An error raised in a worker process would have the worker's traceback as its message.
    """

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
                f"{error}; evaluation never skips samples; repair this sample, or evaluate a "
                "subset without it"
            )
        except OSError as error:
            return InputError(str(error))


def _joined(items: list[Tensor | InputError]) -> MediaBatch | InputError:
    error = next((item for item in items if isinstance(item, InputError)), None)
    if error is not None:
        return error
    # One tensor, because each tensor sent by a worker keeps a file open in the main process.
    return MediaBatch(torch.cat(items), [len(windows) for windows in items])


def media_batches(
    dataset: EvaluationSet, front_end: FrontEnd, batches: Sequence[Sequence[int]], *, workers: int
) -> Iterator[MediaBatch]:
    """Yields the prepared media of each batch of ordinals, in order.

    Raises:
        InputError: if a sample cannot be read or decoded; the message names shard and key.
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
