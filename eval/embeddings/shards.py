"""Encodes media and captions, or one view, of a dataset shard by shard.

Each sample is read and encoded once. Those that lack a view are skipped. Corrupt samples are
skipped and reported. A file that cannot be read is an error.
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
from data_prep.shards.sample import CorruptSampleError
from eval.embeddings.files import BadSample, FileViews, ShardEmbeddings
from eval.models.encoder import Encoder, ItemEncoder, check_embeddings
from eval.models.preprocessing import FrontEnd
from pretrain.settings.views import View


@dataclass(frozen=True)
class Item:
    """A prepared sample."""

    index: int  # index within its shard
    key: str
    windows: Tensor | None  # [n, ...], prepared by eval.models.preprocessing; None: text alone
    captions: list[str]


@dataclass(frozen=True)
class Batch:
    """Consecutive samples of one shard."""

    indices: list[int]  # index of each item within the shard
    keys: list[str]
    captions: list[list[str]]
    windows: Tensor | None  # [n, ...] of all items; None without items, or for text alone
    num_windows: list[int]  # number of windows of each item
    bad_samples: list[BadSample]
    errors: list[InputError]  # errors to raise


class _Items(torch.utils.data.Dataset):
    """Map from ordinal to an item, a corrupt sample, or an error for the main process to raise.

    An error raised in a worker process would have the worker's traceback as its message.
    """

    def __init__(self, dataset: Dataset, front_end: FrontEnd | None, views: FileViews) -> None:
        self.dataset = dataset
        self.front_end = front_end
        self.members = views.members
        self.media = None if views.media is None else View.parse(views.media).member
        self.text = None if views.text is None else View.parse(views.text).member

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, ordinal: int) -> Item | BadSample | InputError:
        shard, index = self.dataset.locate(ordinal)
        try:
            contents = self.dataset.read_modalities(ordinal, names=self.members)
            windows = None
            if self.media is not None:
                windows = self.front_end.prepare(contents, self.media)
            captions = [] if self.text is None else contents.texts[self.text]
            return Item(index, contents.key, windows, captions)
        except CorruptSampleError as error:
            return BadSample(self.dataset.manifest[shard].name, ordinal, str(error))
        except OSError as error:
            return InputError(
                f"cannot read a shard: {error}; run the command again when it is readable"
            )


def _join_items(items: list[Item | BadSample | InputError]) -> Batch:
    good = [item for item in items if isinstance(item, Item)]
    windows = [item.windows for item in good if item.windows is not None]
    return Batch(
        indices=[item.index for item in good],
        keys=[item.key for item in good],
        captions=[item.captions for item in good],
        # One tensor, because each tensor sent by a worker keeps a file open in the main process.
        windows=torch.cat(windows) if windows else None,
        num_windows=list(map(len, windows)),
        bad_samples=[item for item in items if isinstance(item, BadSample)],
        errors=[item for item in items if isinstance(item, InputError)],
    )


def embed_shards(
    encoder: Encoder, dataset: Dataset, shards: Sequence[int], *, views: FileViews
) -> Iterator[tuple[int, ShardEmbeddings]]:
    """Yields (shard number, embeddings) of each shard, in order.

    Prepared media are encoded as soon as they fill a batch.

    Args:
        encoder: encoder of the model.
        dataset: dataset to embed.
        shards: numbers of the shards.
        views: views to encode.

    Raises:
        InputError: if a shard cannot be read, or an embedding is not finite.
    """
    front_end, modality = None, ""
    if views.media is not None:
        modality = View.parse(views.media).modality
        front_end = encoder.front_ends[modality]
    is_audio = front_end is not None and front_end.kind == "audio"
    size = encoder.items_at_once if is_audio else encoder.batch_size
    batches = [batch for shard in shards for batch in _batches(dataset, shard, size, views)]
    loader = DataLoader(
        _Items(dataset, front_end, views),
        batch_sampler=[ordinals for _, ordinals, _ in batches],
        num_workers=encoder.workers,
        collate_fn=_join_items,
    )
    embeddings, items, captions = ShardEmbeddings(), ItemEncoder(encoder, modality), []
    bar = tqdm(loader, desc=f"encoding {dataset.folder}", unit="batch", disable=None)
    for (shard, _, is_last), batch in zip(batches, bar, strict=True):
        if batch.errors:
            raise batch.errors[0]
        embeddings.indices += batch.indices
        embeddings.keys += batch.keys
        embeddings.num_captions += map(len, batch.captions)
        embeddings.bad_samples += batch.bad_samples
        captions += [caption for of_item in batch.captions for caption in of_item]
        if batch.windows is not None:
            items.add(batch.windows, batch.num_windows)
        if is_last:
            if embeddings.keys and views.media is not None:
                embeddings.media.append(_checked(items.finish(), f"media of {dataset.folder}"))
            if captions:
                of_texts = View.parse(views.text).modality
                texts = encoder.encode_texts(captions, modality=of_texts)
                embeddings.captions.append(_checked(texts, f"captions of {dataset.folder}"))
            yield shard, embeddings
            embeddings, items, captions = ShardEmbeddings(), ItemEncoder(encoder, modality), []


def _batches(
    dataset: Dataset, shard: int, size: int, views: FileViews
) -> Iterator[tuple[int, list[int], bool]]:
    """Yields (shard, ordinals, whether it is the last batch) of each batch of a shard.

    A shard without such samples has one empty batch.
    """
    having = dataset.shard_starts[shard] + np.flatnonzero(dataset.has_all(shard, views.members))
    for start in range(0, max(len(having), 1), size):
        ordinals = having[start : start + size].tolist()
        yield shard, ordinals, start + size >= len(having)


def _checked(embeddings: Tensor, name: str) -> np.ndarray:
    check_embeddings(embeddings, name=name)
    return embeddings.numpy()
