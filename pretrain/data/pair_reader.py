"""Reads one source's samples by ordinal, and replaces those whose bytes are bad.

A sample that fails its checksum or does not decode is replaced by another one of its shard, which
depends on the bad sample's place alone: the same one on every rank, in every epoch and attempt. The
replacement is recorded. What fails for the moment is tried again, and then stops the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.shards.sample import (
    BadShardError,
    CorruptSampleError,
    Sample,
    captions_of,
    media_extension_of,
)
from data_prep.shards.subset import KeptSamples
from data_prep.storage.retry import RetryPolicy
from pretrain.data.transforms import MediaTransform
from pretrain.sampling.keyed_random import SampleRandom, key_of, permute, sample_random

MAX_SUBSTITUTES = 16
# What another sample can stand in for.
BAD_BYTES = (CorruptSampleError, MediaError, BadShardError)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pair:
    """A decoded image or clip and its captions."""

    ordinal: int  # of the sample whose content this is
    media: Any
    captions: list[str]


@dataclass(frozen=True)
class BadSample:
    """One row of the ledger of substitutions."""

    source: str
    epoch: int
    ordinal: int
    shard: str
    substitute: int  # ordinal of what was read instead
    reason: str
    is_shard_bad: bool = False  # all of its shard is missing or damaged


@dataclass(frozen=True)
class TrainingPair:
    """An augmented image or clip and one of its captions."""

    ordinal: int  # of the sample whose content this is
    values: Tensor
    stripes: list[tuple[int, int]]
    caption: str
    bad_sample: BadSample | None = None  # what it stands for, if that is another sample


@dataclass(frozen=True)
class OpenedPair:
    """The bytes of an image or clip, and one of its captions."""

    ordinal: int
    sample: Sample
    caption: str
    rng: SampleRandom  # of which the caption's number is taken

    @property
    def num_bytes(self) -> int:
        return sum(map(len, self.sample.members.values()))


@dataclass(frozen=True)
class DecodedPair:
    """The part of an image or clip that is shown, not yet augmented, and one of its captions."""

    ordinal: int  # of the sample whose content this is
    part: np.ndarray
    caption: str
    rng: SampleRandom  # of which the part's numbers are taken
    bad_sample: BadSample | None = None  # what it stands for, if that is another sample


class PairReader:
    """Pairs of one source, by ordinal.

    Args:
        source: its name.
        samples: of its dataset, all or what a subset keeps.
        kind: of media that it must hold.
        transform: decodes its kind of media.
        seed: the run's seed.
        retries: of a read that failed for the moment; shards that are fetched are not read again,
            because fetching has its own retries.
        takes_bad_shards: read other shards' samples for those of a missing or damaged shard.

    Raises:
        InputError: the dataset holds another kind of media.
    """

    def __init__(
        self,
        source: str,
        *,
        samples: KeptSamples,
        kind: str,
        transform: MediaTransform,
        seed: int = 0,
        retries: int = 0,
        takes_bad_shards: bool = False,
    ) -> None:
        self.source = source
        self.samples = samples
        self.dataset = samples.dataset
        self.transform = transform
        self.seed = seed
        self.retry_policy = RetryPolicy(retries if samples.dataset.fetch_shard is None else 0)
        self.takes_bad_shards = takes_bad_shards
        self._ranks_before = np.cumsum(samples.shard_sizes) - samples.shard_sizes
        if self.dataset.info.media != kind:
            raise InputError(
                f"source {source!r}: expected a dataset of {kind}, found {self.dataset.info.media} "
                f"in {self.dataset.folder}"
            )

    # ------------------------------------------------------------------------------- as it is

    def read_exactly(self, ordinal: int) -> Pair:
        """The pair, without substitution.

        Raises:
            CorruptSampleError, MediaError: its bytes are bad.
            BadShardError, OSError: as Dataset.read_sample.
        """
        sample = self._retry(lambda: self.dataset.read_sample(ordinal))
        media = self._decode(sample, self.transform.decode)
        return Pair(ordinal, media, captions_of(sample))

    def _decode(self, sample: Sample, decode: Callable[[bytes, str], Result]) -> Result:
        kind = self.dataset.info.media
        extension = media_extension_of(sample.members, kind)
        if extension is None:
            raise CorruptSampleError(f"{sample}: no {kind} among {sorted(sample.members)}")
        try:
            return decode(sample.members[extension], extension)
        except MediaError as error:
            raise MediaError(f"{sample}: .{extension}: {error}", reason=error.reason) from None

    def _retry(self, read: Callable[[], Result]) -> Result:
        return self.retry_policy.call(read, is_transient=_is_os_error)

    # ------------------------------------------------------------------------------ for training

    def read_training(self, ordinal: int, *, epoch: int) -> TrainingPair:
        """The pair as an epoch shows it, or that of its substitute.

        Raises:
            InputError, BadShardError, OSError: as decode_training.
        """
        pair = self.decode_training(ordinal, epoch=epoch)
        row = torch.empty(self.transform.row_shape, dtype=self.transform.row_dtype)
        stripes = self.transform.write_row(pair.part, pair.rng, row)
        return TrainingPair(pair.ordinal, row, stripes, pair.caption, pair.bad_sample)

    def open_training(self, ordinal: int, *, epoch: int) -> OpenedPair | None:
        """What decode_training begins with, to be done earlier; None if the bytes are bad.

        Raises:
            OSError: the shard cannot be read now.
        """
        try:
            return self._open(ordinal, epoch)
        except BAD_BYTES:
            return None  # decode_training meets it again

    def decode_training(
        self, ordinal: int, *, epoch: int, opened: OpenedPair | None = None
    ) -> DecodedPair:
        """The pair as an epoch shows it, or that of its substitute, up to transform.write_row.

        Args:
            ordinal: of the sample.
            epoch: that shows it.
            opened: what open_training gave.

        Raises:
            InputError: neither it nor its substitutes can be decoded.
            BadShardError: its shard is missing or damaged (unless takes_bad_shards).
            OSError: the shard cannot be read now.
        """
        error: Exception | None = None
        num_tried = 0
        for candidate in self._candidates(ordinal):
            try:
                pair = self._decoded(opened or self._open(candidate, epoch))
            except BAD_BYTES as raised:
                if isinstance(raised, BadShardError) and not self.takes_bad_shards:
                    raise
                error, num_tried, opened = error or raised, num_tried + 1, None
                continue
            if error is None:
                return pair
            return replace(pair, bad_sample=self._bad_sample(ordinal, epoch, candidate, error))
        raise InputError(
            f"source {self.source!r}: neither this sample nor {num_tried - 1} neighbours can be "
            f"read: {error}; check the dataset with python -m data_prep.verify_shards"
        )

    def _open(self, ordinal: int, epoch: int) -> OpenedPair:
        sample = self._retry(lambda: self.dataset.read_sample(ordinal))
        captions = captions_of(sample)
        rng = sample_random(self.seed, source=self.source, epoch=epoch, ordinal=ordinal)
        return OpenedPair(ordinal, sample, captions[rng.below(len(captions))], rng)

    def _decoded(self, opened: OpenedPair) -> DecodedPair:
        rng = opened.rng
        part = self._decode(
            opened.sample,
            lambda content, extension: self.transform.decode_training(content, extension, rng),
        )
        return DecodedPair(opened.ordinal, part, opened.caption, rng)

    def _bad_sample(self, ordinal: int, epoch: int, substitute: int, error: Exception) -> BadSample:
        shard = self.dataset.manifest[self.dataset.locate(ordinal)[0]].name
        is_shard_bad = isinstance(error, BadShardError)
        return BadSample(self.source, epoch, ordinal, shard, substitute, str(error), is_shard_bad)

    def _candidates(self, ordinal: int) -> Iterator[int]:
        """The sample, then others in the order they are tried.

        Those of its own shard, which is at hand; of the next shards only if all of it was tried, or
        if it is bad as a whole.
        """
        yield ordinal
        shard, _ = self.dataset.locate(ordinal)
        rank = int(self.samples.ranks_of([ordinal])[0])
        place = rank - int(self._ranks_before[shard])
        key = key_of("substitute", ordinal)
        for number in np.roll(np.arange(len(self.dataset.manifest)), -shard).tolist():
            size = int(self.samples.shard_sizes[number])
            steps = np.arange(min(MAX_SUBSTITUTES, size))
            places = (place + permute(steps, sizes=size, keys=key)) % size if size else steps
            ordinals = self.samples.ordinals_of(self._ranks_before[number] + places)
            yield from (each for each in ordinals.tolist() if each != ordinal)
            if size > MAX_SUBSTITUTES and not self._is_bad(number):
                return

    def _is_bad(self, shard: int) -> bool:
        return self.takes_bad_shards and shard in self.dataset.bad_shards


def _is_os_error(error: Exception) -> bool:
    return isinstance(error, OSError)
