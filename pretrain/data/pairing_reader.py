"""All pairs of one pairing: which are in a step, and how they become rows of its buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from pretrain.cache.shard_cache import ShardCache
from pretrain.config import (
    MediaKind,
    Pairing,
    PairingName,
    PretrainConfig,
    Source,
    media_of_pairing,
)
from pretrain.data.batch import PairBuffers, PairLayout
from pretrain.data.datasets import open_samples
from pretrain.data.pair_reader import BadSample, DecodedPair, PairReader
from pretrain.data.transforms import MediaTransform
from pretrain.model.tokenizer import Tokenizer, token_keys
from pretrain.sampling.keyed_random import key_of, scramble
from pretrain.sampling.mixing import PairingChoice
from pretrain.sampling.order import (
    PairingOrder,
    Segment,
    SourceOrder,
    StepSamples,
    digest_halves,
)

# Pairs are read, decoded and resized a few at a time: so the processor does the same for a while,
# which is a tenth faster than each pair from its bytes to its row.
GROUP_PAIRS = 16
GROUP_BYTES = 4 << 20
T = TypeVar("T")


class PairingReader:
    """All sources of one pairing, in their order.

    Args:
        name: the pairing's.
        config: the whole config.
        transform: of its kind of media.
        tokenizer: of captions.
        choice: which steps take the pairing.
        cache: of this node, for datasets behind URLs.
    """

    def __init__(
        self,
        name: PairingName,
        *,
        config: PretrainConfig,
        transform: MediaTransform,
        tokenizer: Tokenizer,
        choice: PairingChoice,
        cache: ShardCache | None,
    ) -> None:
        self.name = name
        self.transform = transform
        self.tokenizer = tokenizer
        self.choice = choice
        sources = _distinct_sources(config.pairings[name])
        kind = media_of_pairing(name)
        self.readers = [
            _open_source(source, kind, config=config, transform=transform, cache=cache)
            for source in sources
        ]
        self.order = _build_order(name, config, readers=self.readers, choice=choice)
        self.source_keys = [key_of("source", name, source.name) for source in sources]
        self._key_of_source = np.array(self.source_keys, dtype=np.uint64)
        self.layout = PairLayout(
            media_shape=transform.row_shape,
            media_dtype=transform.row_dtype,
            num_stripes=transform.num_stripes,
            context_length=tokenizer.context_length,
        )

    def num_steps_taken(self, num_steps: int) -> int:
        """Of the run's first steps, how many take this pairing."""
        return self.choice.num_taken(num_steps)[self.name]

    def samples_of_step(self, step: int, *, lanes: range) -> StepSamples:
        """What the given lanes hold in one of the run's steps; nothing if it takes others."""
        if self.name not in self.choice.pairings_of_step(step):
            return self.order.samples_of_step(0, lanes=lanes[:0])
        return self.order.samples_of_step(self.num_steps_taken(step), lanes=lanes)

    def digest(self, samples: StepSamples) -> np.ndarray:
        """int64 [2]: see sample_order.digest_halves."""
        return digest_halves(samples, source_keys=self.source_keys)

    def fill(
        self, buffers: PairBuffers, samples: StepSamples, rows: range
    ) -> tuple[list[BadSample], Counter[tuple[str, int]]]:
        """Reads the samples of some rows into their places; returns (substitutions, num_read).

        May be called by several threads for rows that are not the same.
        """
        part = slice(rows.start, rows.stop)
        media = buffers.media[part].unbind()
        bad_samples, num_read, captions, ordinals = [], Counter(), [], []
        for row, (reader, epoch, pair) in enumerate(self._decoded_pairs(samples, rows)):
            stripes = self.transform.write_row(pair.part, pair.rng, media[row])
            if stripes:
                buffers.stripes[rows[row]] = torch.tensor(stripes, dtype=torch.int32)
            captions.append(pair.caption)
            ordinals.append(pair.ordinal)
            num_read[reader.source, epoch] += 1
            if pair.bad_sample is not None:
                bad_samples.append(pair.bad_sample)
        tokens = self.tokenizer(captions)
        buffers.tokens[part] = tokens
        buffers.caption_lengths[part] = self.tokenizer.lengths(tokens)
        buffers.caption_keys[part] = token_keys(tokens)
        media_keys = scramble(
            self._key_of_source[samples.sources[part]] ^ np.array(ordinals, dtype=np.uint64)
        )
        buffers.media_keys[part] = torch.from_numpy(media_keys.view(np.int64))
        return bad_samples, num_read

    def _decoded_pairs(
        self, samples: StepSamples, rows: range
    ) -> Iterator[tuple[PairReader, int, DecodedPair]]:
        """(reader, epoch, pair) of each row; read and decoded in groups."""
        part = slice(rows.start, rows.stop)
        wanted = zip(
            [self.readers[source] for source in samples.sources[part].tolist()],
            samples.epochs[part].tolist(),
            samples.ordinals[part].tolist(),
            strict=True,
        )
        opened = (
            (reader, epoch, ordinal, reader.open_training(ordinal, epoch=epoch))
            for reader, epoch, ordinal in wanted
        )
        for group in _groups(opened, lambda pair: pair[-1].num_bytes if pair[-1] else 0):
            decoded = (
                (reader, epoch, reader.decode_training(ordinal, epoch=epoch, opened=pair))
                for reader, epoch, ordinal, pair in group
            )
            for each in _groups(decoded, lambda pair: pair[-1].part.nbytes):
                yield from each


def _groups(items: Iterable[T], num_bytes: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours, GROUP_PAIRS or somewhat more than GROUP_BYTES of them at the most."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += num_bytes(item)
        if len(group) >= GROUP_PAIRS or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


def _distinct_sources(pairing: Pairing) -> list[Source]:
    """Each source once: those of the beginning, then those that segments add, in their order."""
    sources: dict[str, Source] = {}
    for source in pairing.all_sources:
        sources.setdefault(source.name, source)
    return list(sources.values())


def _open_source(
    source: Source,
    kind: MediaKind,
    *,
    config: PretrainConfig,
    transform: MediaTransform,
    cache: ShardCache | None,
) -> PairReader:
    takes_bad_shards = config.loading.on_bad_shard == "substitute"
    samples = open_samples(
        source.dataset, subset=source.subset, cache=cache, takes_bad_shards=takes_bad_shards
    )
    return PairReader(
        source.name,
        samples=samples,
        kind=kind,
        transform=transform,
        seed=config.seed,
        retries=config.loading.retries,
        takes_bad_shards=takes_bad_shards,
    )


def _build_order(
    name: PairingName,
    config: PretrainConfig,
    *,
    readers: Sequence[PairReader],
    choice: PairingChoice,
) -> PairingOrder:
    """The order of a pairing's samples, over the steps that take it."""
    pairing = config.pairings[name]
    by_step = [(0, pairing.sources)]
    by_step += [(segment.from_step, segment.sources) for segment in pairing.segments]
    segments = []
    for from_step, used in by_step:
        weights = {source.name: source.weight for source in used}
        segments.append(
            Segment(
                choice.num_taken(from_step)[name],
                [weights.get(reader.source, 0.0) for reader in readers],
            )
        )
    sources = [
        SourceOrder(
            reader.source,
            shard_sizes=reader.samples.shard_sizes,
            lanes=config.lanes,
            window=config.loading.window,
            seed=config.seed,
            samples=reader.samples,
        )
        for reader in readers
    ]
    return PairingOrder(
        name,
        sources=sources,
        segments=segments,
        global_batch_size=pairing.global_batch_size,
        seed=config.seed,
    )
