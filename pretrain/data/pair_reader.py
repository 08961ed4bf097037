"""Reader of one source's samples by ordinal, with substitutes for bad samples.

A sample that fails its checksum or does not decode is substituted by another one of its shard. The
choice depends on the bad sample's ordinal alone, so it is the same on every rank, in every epoch
and attempt. Substitutions are recorded. Transient errors are retried, and then stop the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

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
# Errors of a sample that another one can substitute.
BAD_BYTES = (CorruptSampleError, MediaError, BadShardError)
Result = TypeVar("Result")


@dataclass(frozen=True)
class Pair:
    """A decoded image or clip and its captions."""

    ordinal: int
    media: Any
    captions: list[str]


@dataclass(frozen=True)
class BadSample:
    """One substitution."""

    source: str
    epoch: int
    ordinal: int
    shard: str
    substitute: int  # ordinal of the sample that was read instead
    reason: str
    is_shard_bad: bool = False  # the whole shard is missing or damaged


@dataclass(frozen=True)
class DrawnPair:
    """A sample with what an epoch draws for it: its caption and its random numbers.

    It holds its bytes until it is decoded, and then the part of its media that is shown.
    """

    ordinal: int  # of the sample that is read, which may be a substitute
    caption: str
    rng: SampleRandom  # next number: the transform's
    sample: Sample | None  # None after decoding
    part: np.ndarray | None = None  # None before decoding
    bad_sample: BadSample | None = None  # the sample that this one substitutes

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds."""
        if self.sample is None:
            return self.part.nbytes
        return sum(map(len, self.sample.members.values()))


class PairReader:
    """Reader of the pairs of one source, by ordinal.

    Args:
        source: the source's name.
        samples: samples of its dataset, all or those that a subset keeps.
        kind: kind of media that the dataset must hold.
        transform: transform of this kind of media.
        seed: the run's seed.
        retries: retries of a read after a transient error. Shards behind URLs are not read again,
            because fetching them has its own retries.
        takes_bad_shards: whether samples of other shards substitute those of a missing or damaged
            shard.

    Raises:
        InputError: if the dataset holds another kind of media.
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

    # ---------------------------------------------------------------------- without substitution

    def read_exactly(self, ordinal: int) -> Pair:
        """Reads a pair without substitution.

        Raises:
            CorruptSampleError, MediaError: if its bytes are bad.
            BadShardError, OSError: as `Dataset.read_sample`.
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

    def open_training(self, ordinal: int, *, epoch: int) -> DrawnPair | None:
        """Reads the bytes of a sample ahead of `decode_training`.

        Returns:
            The pair, or None if its bytes are bad; `decode_training` then finds them bad again.

        Raises:
            OSError: if the shard cannot be read now.
        """
        try:
            return self._open(ordinal, epoch)
        except BAD_BYTES:
            return None

    def decode_training(
        self, ordinal: int, *, epoch: int, opened: DrawnPair | None = None
    ) -> DrawnPair:
        """Decodes a sample as an epoch shows it, or a substitute if its bytes are bad.

        Args:
            ordinal: number of the sample.
            epoch: epoch that shows it.
            opened: result of `open_training`.

        Returns:
            The pair, for `transform.write_row`.

        Raises:
            InputError: if neither the sample nor its substitutes can be decoded.
            BadShardError: if its shard is missing or damaged (unless takes_bad_shards).
            OSError: if the shard cannot be read now.
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

    def _open(self, ordinal: int, epoch: int) -> DrawnPair:
        sample = self._retry(lambda: self.dataset.read_sample(ordinal))
        captions = captions_of(sample)
        rng = sample_random(self.seed, source=self.source, epoch=epoch, ordinal=ordinal)
        return DrawnPair(ordinal, captions[rng.below(len(captions))], rng, sample)

    def _decoded(self, opened: DrawnPair) -> DrawnPair:
        part = self._decode(
            opened.sample,
            lambda content, extension: self.transform.decode_training(
                content, extension, opened.rng
            ),
        )
        return replace(opened, sample=None, part=part)

    def _bad_sample(self, ordinal: int, epoch: int, substitute: int, error: Exception) -> BadSample:
        shard = self.dataset.manifest[self.dataset.locate(ordinal)[0]].name
        is_shard_bad = isinstance(error, BadShardError)
        return BadSample(self.source, epoch, ordinal, shard, substitute, str(error), is_shard_bad)

    def _candidates(self, ordinal: int) -> Iterator[int]:
        """The sample, then others in the order in which they are tried.

        Samples of its own shard come first, because this shard is open already. The next shards
        follow only if the whole shard was tried, or is bad as a whole.
        """
        yield ordinal
        shard, _ = self.dataset.locate(ordinal)
        rank = int(self.samples.ranks_of([ordinal])[0])
        index = rank - int(self._ranks_before[shard])
        key = key_of("substitute", ordinal)
        for number in np.roll(np.arange(len(self.dataset.manifest)), -shard).tolist():
            size = int(self.samples.shard_sizes[number])
            steps = np.arange(min(MAX_SUBSTITUTES, size))
            indices = (index + permute(steps, sizes=size, keys=key)) % size if size else steps
            ordinals = self.samples.ordinals_of(self._ranks_before[number] + indices)
            yield from (each for each in ordinals.tolist() if each != ordinal)
            if size > MAX_SUBSTITUTES and not self._is_bad(number):
                return

    def _is_bad(self, shard: int) -> bool:
        return self.takes_bad_shards and shard in self.dataset.bad_shards


def _is_os_error(error: Exception) -> bool:
    return isinstance(error, OSError)
