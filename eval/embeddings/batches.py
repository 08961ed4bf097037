"""Reads and prepares batches of an evaluation set's items, optionally in worker processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data_prep.errors import InputError
from data_prep.shards.sample import CorruptSampleError
from eval.datasets.datasets import EvaluationSet
from eval.datasets.views import read_contents
from eval.models.preprocessing import FrontEnd


class MediaBatch(NamedTuple):
    """Prepared windows of a batch of items."""

    windows: Tensor  # [n, ...] windows of the first item, then of the second, and so on
    num_windows: list[int]  # number of windows of each item; they sum to n


class _PreparedMedia(torch.utils.data.Dataset):
    """Map from ordinal to prepared media, or to an error for the main process to raise.

    An error raised in a worker process would have the worker's traceback as its message.
    """

    def __init__(self, dataset: EvaluationSet, front_end: FrontEnd, member: str) -> None:
        self.dataset = dataset
        self.front_end = front_end
        self.member = member

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ordinal: int) -> Tensor | InputError:
        try:
            contents = read_contents(self.dataset, ordinal, members=[self.member])
            return self.front_end.prepare(contents, self.member)
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
    dataset: EvaluationSet,
    front_end: FrontEnd,
    batches: Sequence[Sequence[int]],
    *,
    member: str,
    workers: int,
) -> Iterator[MediaBatch]:
    """Yields the prepared images, clips or vectors of each batch of ordinals, in order.

    Args:
        dataset: dataset of the samples.
        front_end: preparation of the modality.
        batches: ordinals of each batch.
        member: modality of the dataset to prepare.
        workers: number of worker processes; 0: the main process prepares them.

    Raises:
        InputError: if a sample cannot be read or decoded; the message names shard and key.
    """
    loader = DataLoader(
        _PreparedMedia(dataset, front_end, member),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_joined,
    )
    for batch in loader:
        if isinstance(batch, InputError):
            raise batch
        yield batch
