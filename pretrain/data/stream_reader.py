"""Reader of one stream: samples of a step -> rows of its buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from pretrain.cache.shard_cache import ShardCache
from pretrain.config import (
    Loading,
    MediaKind,
    Source,
    Stream,
    StreamName,
)
from pretrain.data.batch import StreamBuffers, StreamLayout, ViewLayout
from pretrain.data.datasets import open_samples
from pretrain.data.pair_reader import BadSample, DrawnPair, PairReader
from pretrain.data.transforms import MediaTransform
from pretrain.model.tokenizer import Tokenizer, token_keys
from pretrain.sampling.keyed_random import scramble
from pretrain.sampling.order import StepSamples, source_key
from pretrain.sampling.schedule import distinct_sources

# Pairs are read, decoded and resized in small groups: one kind of work at a time keeps the
# processor's caches warm, a tenth faster than taking each pair from its bytes to its row.
GROUP_PAIRS = 16
GROUP_BYTES = 4 << 20
T = TypeVar("T", bound=tuple)


@dataclass
class FilledRows:
    """Result of filling the media of some rows."""

    captions: list[str] = field(default_factory=list)  # one per row
    bad_samples: list[BadSample] = field(default_factory=list)
    # (source, epoch) -> rows that show this epoch, substitutes included
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)


class StreamReader:
    """Reader of all sources of one stream.

    Args:
        name: the stream's name.
        sources: readers of its sources, as samples of a step number them.
        kind: kind of media of all sources.
        transform: transform of this kind of media.
        tokenizer: tokenizer of captions.
    """

    def __init__(
        self,
        name: StreamName,
        *,
        sources: Sequence[PairReader],
        kind: MediaKind,
        transform: MediaTransform,
        tokenizer: Tokenizer,
    ) -> None:
        self.name = name
        self.sources = list(sources)
        self.transform = transform
        self.tokenizer = tokenizer
        keys = [source_key(name, each.source) for each in sources]
        self._source_keys = np.array(keys, dtype=np.uint64)
        self.kind = kind
        of_media = ViewLayout(transform.row_shape, transform.row_dtype, transform.num_masks)
        of_text = ViewLayout((tokenizer.context_length,), torch.int64, has_lengths=True)
        self.layout = StreamLayout({kind: of_media, "text": of_text})

    def fill(
        self, buffers: StreamBuffers, samples: StepSamples, rows: range
    ) -> tuple[list[BadSample], Counter[tuple[str, int]]]:
        """Reads the samples of some rows into these rows; returns (substitutions, num_read).

        Several threads may call it at once, each for other rows.
        """
        filled = self.fill_media(buffers, samples, rows)
        self.fill_captions(buffers, filled.captions, rows)
        return filled.bad_samples, filled.num_read

    def fill_media(self, buffers: StreamBuffers, samples: StepSamples, rows: range) -> FilledRows:
        """Fills some rows, except for what `fill_captions` fills."""
        part = slice(rows.start, rows.stop)
        view = buffers.views[self.kind]
        media = view.values[part].unbind()
        filled, ordinals = FilledRows(), []
        for row, (reader, epoch, pair) in enumerate(self._decoded_pairs(samples, rows)):
            masks = self.transform.write_row(pair.part, pair.rng, media[row])
            if masks:
                view.masks[rows[row]] = torch.tensor(masks, dtype=torch.int32)
            filled.captions.append(pair.caption)
            ordinals.append(pair.ordinal)
            filled.num_read[reader.source, epoch] += 1
            if pair.bad_sample is not None:
                filled.bad_samples.append(pair.bad_sample)
        media_keys = scramble(
            self._source_keys[samples.sources[part]] ^ np.array(ordinals, dtype=np.uint64)
        )
        view.keys[part] = torch.from_numpy(media_keys.view(np.int64))
        return filled

    def fill_captions(self, buffers: StreamBuffers, captions: Sequence[str], rows: range) -> None:
        """Fills the tokens of some rows, their lengths and their keys."""
        part = slice(rows.start, rows.stop)
        view, tokens = buffers.views["text"], self.tokenizer(captions)
        view.values[part] = tokens
        view.lengths[part] = self.tokenizer.lengths(tokens)
        view.keys[part] = token_keys(tokens)

    def _decoded_pairs(
        self, samples: StepSamples, rows: range
    ) -> Iterator[tuple[PairReader, int, DrawnPair]]:
        """(reader, epoch, pair) of each row; read and decoded in groups."""
        part = slice(rows.start, rows.stop)
        wanted = zip(
            [self.sources[number] for number in samples.sources[part].tolist()],
            samples.epochs[part].tolist(),
            samples.ordinals[part].tolist(),
            strict=True,
        )
        opened = (
            (reader, epoch, ordinal, reader.open_training(ordinal, epoch=epoch))
            for reader, epoch, ordinal in wanted
        )
        for group in _groups(opened):
            decoded = (
                (reader, epoch, reader.decode_training(ordinal, epoch=epoch, opened=pair))
                for reader, epoch, ordinal, pair in group
            )
            for each in _groups(decoded):
                yield from each


def _groups(items: Iterable[T]) -> Iterator[list[T]]:
    """Runs of tuples that end with a pair or None: at most GROUP_PAIRS, or about GROUP_BYTES."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += item[-1].num_bytes if item[-1] is not None else 0
        if len(group) >= GROUP_PAIRS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


# ------------------------------------------------------------------------------------- building


def open_readers(
    streams: Mapping[StreamName, Stream],
    loading: Loading,
    *,
    transforms: Mapping[MediaKind, MediaTransform],
    tokenizer: Tokenizer,
    seed: int,
    cache: ShardCache | None,
) -> dict[StreamName, StreamReader]:
    """Opens the datasets of all streams.

    Args:
        streams: sections of the config, by name.
        loading: section `loading`.
        transforms: transform of each kind of media.
        tokenizer: tokenizer of captions.
        seed: the run's seed.
        cache: this machine's cache, for datasets behind URLs.

    Raises:
        InputError: if a dataset cannot be used.
        RunError: if a dataset behind a URL cannot be reached now.
    """
    readers = {}
    for name, stream in streams.items():
        kind = stream.media
        sources = [
            _open_source(
                source,
                loading,
                kind=kind,
                transform=transforms[kind],
                seed=seed,
                cache=cache,
            )
            for source in distinct_sources(stream)
        ]
        readers[name] = StreamReader(
            name, sources=sources, kind=kind, transform=transforms[kind], tokenizer=tokenizer
        )
    return readers


def _open_source(
    source: Source,
    loading: Loading,
    *,
    kind: MediaKind,
    transform: MediaTransform,
    seed: int,
    cache: ShardCache | None,
) -> PairReader:
    takes_bad_shards = loading.on_bad_shard == "substitute"
    samples = open_samples(
        source.dataset, subset=source.subset, cache=cache, takes_bad_shards=takes_bad_shards
    )
    return PairReader(
        source.name,
        samples=samples,
        kind=kind,
        transform=transform,
        seed=seed,
        retries=loading.retries,
        takes_bad_shards=takes_bad_shards,
    )
