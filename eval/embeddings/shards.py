"""Encodes media and captions of a dataset shard by shard; each sample is read and encoded once.

Corrupt samples are skipped and reported. A file that cannot be read is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import (
    CorruptSampleError,
    captions_of,
)
from data_prep.shards.sample_contents import contents_of
from eval.embeddings.files import BadSample, ShardEmbeddings
from eval.models.encoder import Encoder, ItemEncoder, check_embeddings
from eval.models.preprocessing import FrontEnd


@dataclass(frozen=True)
class Item:
    """A prepared sample."""

    index: int  # index within its shard
    key: str
    windows: Tensor  # [n, ...], prepared by eval.models.preprocessing
    captions: list[str]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of one shard."""

    indices: list[int]  # index of each item within the shard
    keys: list[str]
    captions: list[list[str]]
    windows: Tensor | None  # [n, ...] of all items; None if all samples are corrupt
    num_windows: list[int]  # number of windows of each item
    bad_samples: list[BadSample]
    errors: list[InputError]  # errors to raise


class _Items(torch.utils.data.Dataset):
    """Map from ordinal to an item, a corrupt sample, or an error for the main process to raise.

    An error raised in a worker process would have the worker's traceback as its message.
    """

    def __init__(self, dataset: Dataset, front_end: FrontEnd) -> None:
        self.dataset = dataset
        self.front_end = front_end

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ordinal: int) -> Item | BadSample | InputError:
        shard, index = self.dataset.locate(ordinal)
        try:
            sample = self.dataset.read_sample(ordinal)
            contents = contents_of(sample, self.dataset.modalities, names=[self.dataset.info.media])
            windows = self.front_end.prepare(contents, self.dataset.info.media)
            return Item(index, sample.key, windows, captions_of(sample))
        except CorruptSampleError as error:
            return BadSample(self.dataset.manifest[shard].name, ordinal, str(error))
        except OSError as error:
            return InputError(
                f"cannot read a shard: {error}; run the command again when it is readable"
            )


def _join_items(items: list[Item | BadSample | InputError]) -> Batch:
    good = [item for item in items if isinstance(item, Item)]
    return Batch(
        indices=[item.index for item in good],
        keys=[item.key for item in good],
        captions=[item.captions for item in good],
        # One tensor, because each tensor sent by a worker keeps a file open in the main process.
        windows=torch.cat([item.windows for item in good]) if good else None,
        num_windows=[len(item.windows) for item in good],
        bad_samples=[item for item in items if isinstance(item, BadSample)],
        errors=[item for item in items if isinstance(item, InputError)],
    )


def embed_shards(
    encoder: Encoder, dataset: Dataset, shards: Sequence[int]
) -> Iterator[tuple[int, ShardEmbeddings]]:
    """Yields (shard number, embeddings) of each shard, in order.

    Prepared media are encoded as soon as they fill a batch.

    Raises:
        InputError: if a shard cannot be read, or an embedding is not finite.
    """
    batches = [(shard, batch) for shard in shards for batch in _batches(encoder, dataset, shard)]
    loader = DataLoader(
        _Items(dataset, encoder.front_ends[dataset.info.media]),
        batch_sampler=[ordinals for _, ordinals in batches],
        num_workers=encoder.workers,
        collate_fn=_join_items,
    )
    kind, embeddings = dataset.info.media, ShardEmbeddings()
    items, captions = ItemEncoder(encoder, kind), []
    bar = tqdm(loader, desc=f"encoding {dataset.folder}", unit="batch", disable=None)
    for (shard, ordinals), batch in zip(batches, bar, strict=True):
        if batch.errors:
            raise batch.errors[0]
        embeddings.indices += batch.indices
        embeddings.keys += batch.keys
        embeddings.num_captions += map(len, batch.captions)
        embeddings.bad_samples += batch.bad_samples
        captions += [caption for of_item in batch.captions for caption in of_item]
        if batch.windows is not None:
            items.add(batch.windows, batch.num_windows)
        if ordinals.stop == dataset.shard_starts[shard + 1]:
            if embeddings.keys:
                embeddings.media.append(_checked(items.finish(), f"media of {dataset.folder}"))
                texts = encoder.encode_texts(captions)
                embeddings.captions.append(_checked(texts, f"captions of {dataset.folder}"))
            yield shard, embeddings
            embeddings, items, captions = ShardEmbeddings(), ItemEncoder(encoder, kind), []


def _batches(encoder: Encoder, dataset: Dataset, shard: int) -> Iterator[range]:
    """Yields the ordinals of each batch of a shard; an empty shard has one empty batch."""
    first, end = dataset.shard_starts[shard : shard + 2].tolist()
    size = encoder.items_at_once if dataset.info.media == "audio" else encoder.batch_size
    for start in range(first, max(end, first + 1), size):
        yield range(start, min(start + size, end))


def _checked(embeddings: Tensor, name: str) -> np.ndarray:
    check_embeddings(embeddings, name=name)
    return embeddings.numpy()
