"""Reader of one source's samples by ordinal, with substitutes for bad samples.

A sample that fails its checksum or does not decode is substituted by another one of its shard. The
choice depends on the bad sample's ordinal alone, so it is the same on every rank, in every epoch
and attempt. Substitutions are recorded. Transient errors are retried, and then stop the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.shards.sample import BadShardError, CorruptSampleError
from data_prep.shards.sample_contents import SampleContents
from data_prep.shards.subset import KeptSamples
from data_prep.storage.retry import RetryPolicy
from pretrain.data.batch import BadSample
from pretrain.data.view_formats import ViewFormat
from pretrain.sampling.keyed_random import SampleRandom, key_of, permute, sample_random

MAX_SUBSTITUTES = 16
# Errors of a sample that another one can substitute.
BAD_BYTES = (CorruptSampleError, MediaError, BadShardError)
Result = TypeVar("Result")


@dataclass(frozen=True)
class DrawnView:
    """A view of a sample as an epoch draws it."""

    part: Any  # what its format opens and then decodes
    rng: SampleRandom  # of this view in this epoch


@dataclass(frozen=True)
class DrawnSample:
    """A sample with what an epoch draws for each view; first opened, then decoded."""

    ordinal: int  # of the sample that is read, which may be a substitute
    views: Mapping[str, DrawnView]  # without those whose modality the sample lacks
    num_bytes: int  # of what it holds, about
    name: str  # for messages
    bad_sample: BadSample | None = None  # the sample that this one substitutes


class SampleReader:
    """Reader of the samples of one source, by ordinal.

    Args:
        source: the source's name.
        samples: samples of its dataset, all or those that a subset keeps.
        formats: format of each view that is read.
        seed: the run's seed.
        retries: retries of a read after a transient error. Shards behind URLs are not read again,
            because fetching them has its own retries.
        takes_bad_shards: whether samples of other shards substitute those of a missing or damaged
            shard.

    Raises:
        InputError: if the dataset has a modality of another kind or shape.
    """

    def __init__(
        self,
        source: str,
        *,
        samples: KeptSamples,
        formats: Mapping[str, ViewFormat],
        seed: int = 0,
        retries: int = 0,
        takes_bad_shards: bool = False,
    ) -> None:
        self.source = source
        self.samples = samples
        self.dataset = samples.dataset
        self.seed = seed
        self.retry_policy = RetryPolicy(retries if samples.dataset.fetch_shard is None else 0)
        self.takes_bad_shards = takes_bad_shards
        self._ranks_before = np.cumsum(samples.shard_sizes) - samples.shard_sizes
        self._set_formats(formats)
        for each in self.formats.values():
            where = f"source {source!r}: {self.dataset.folder}"
            each.check(self.dataset.modalities[each.view.member], where)

    def with_formats(self, formats: Mapping[str, ViewFormat]) -> SampleReader:
        """Returns a reader of the same samples that shows the same views in other formats."""
        other = copy(self)
        other._set_formats(formats)
        return other

    def _set_formats(self, formats: Mapping[str, ViewFormat]) -> None:
        self.formats = {
            name: each
            for name, each in formats.items()
            if each.view.member in self.dataset.modalities
        }

    @cached_property
    def modalities(self) -> frozenset[str]:
        """Modalities of the dataset that the views show."""
        return frozenset(each.view.member for each in self.formats.values())

    def may_lack(self, member: str) -> bool:
        """Returns whether some samples of the dataset may lack a modality."""
        modality = self.dataset.modalities.get(member)
        if modality is None:
            return True
        is_selected = member in self.samples.required
        return not is_selected and modality.num_samples != self.dataset.info.num_samples

    def has_any_with(self, views: Sequence[str]) -> bool:
        """Returns whether a sample has the modalities of all of some views."""
        if not set(views) <= set(self.formats):
            return False
        return self.samples.has_any_with([self.formats[view].view.member for view in views])

    # ---------------------------------------------------------------------- without substitution

    def read_exactly(self, ordinal: int) -> dict[str, tuple[Tensor, ...]]:
        """Reads a sample without substitution and without anything random.

        Returns:
            {view: inputs of its tower, without batch dimension}; absent modalities are left out.

        Raises:
            CorruptSampleError, MediaError: if its bytes are bad.
            BadShardError, OSError: as `Dataset.read_modalities`.
        """
        contents = self._read(ordinal)
        views = {
            name: self._named(contents, lambda each=each: each.exactly(contents))
            for name, each in self.formats.items()
        }
        return {name: inputs for name, inputs in views.items() if inputs is not None}

    def _read(self, ordinal: int) -> SampleContents:
        return self.retry_policy.call(
            lambda: self.dataset.read_modalities(ordinal, names=self.modalities),
            is_transient=_is_os_error,
        )

    @staticmethod
    def _named(sample: SampleContents | str, decode: Callable[[], Result]) -> Result:
        """The result of `decode`, whose errors get the name of the sample."""
        try:
            return decode()
        except MediaError as error:
            raise MediaError(f"{sample}: {error}", reason=error.reason) from None

    # ------------------------------------------------------------------------------ for training

    def open_training(self, ordinal: int, *, epoch: int) -> DrawnSample | None:
        """Reads the bytes of a sample ahead of `decode_training`.

        Returns:
            The sample, or None if its bytes are bad; `decode_training` then finds them bad again.

        Raises:
            OSError: if the shard cannot be read now.
        """
        try:
            return self._open(ordinal, epoch)
        except BAD_BYTES:
            return None

    def decode_training(
        self, ordinal: int, *, epoch: int, opened: DrawnSample | None = None
    ) -> DrawnSample:
        """Decodes a sample as an epoch shows it, or a substitute if its bytes are bad.

        Args:
            ordinal: number of the sample.
            epoch: epoch that shows it.
            opened: result of `open_training`.

        Returns:
            The sample, for `StreamReader.fill_rows`.

        Raises:
            InputError: if neither the sample nor its substitutes can be decoded.
            BadShardError: if its shard is missing or damaged (unless takes_bad_shards).
            OSError: if the shard cannot be read now.
        """
        error: Exception | None = None
        num_tried = 0
        for candidate in self._candidates(ordinal):
            try:
                sample = self._decoded(opened or self._open(candidate, epoch))
            except BAD_BYTES as raised:
                if isinstance(raised, BadShardError) and not self.takes_bad_shards:
                    raise
                error, num_tried, opened = error or raised, num_tried + 1, None
                continue
            if error is None:
                return sample
            return replace(sample, bad_sample=self._bad_sample(ordinal, epoch, candidate, error))
        raise InputError(
            f"source {self.source!r}: neither this sample nor {num_tried - 1} neighbours can be "
            f"read: {error}; check the dataset with python -m data_prep.verify_shards"
        )

    def _open(self, ordinal: int, epoch: int) -> DrawnSample:
        contents, views = self._read(ordinal), {}
        for name, each in self.formats.items():
            rng = sample_random(
                self.seed, source=self.source, epoch=epoch, ordinal=ordinal, view=name
            )
            part = each.open(contents, rng)
            if part is not None:
                views[name] = DrawnView(part, rng)
        num_bytes = sum(map(len, contents.media.values()))
        return DrawnSample(ordinal, views, num_bytes, str(contents))

    def _decoded(self, opened: DrawnSample) -> DrawnSample:
        views = {
            name: replace(
                drawn,
                part=self._named(
                    opened.name,
                    lambda name=name, drawn=drawn: self.formats[name].decode(drawn.part, drawn.rng),
                ),
            )
            for name, drawn in opened.views.items()
        }
        num_bytes = sum(getattr(each.part, "nbytes", 0) for each in views.values())
        return replace(opened, views=views, num_bytes=num_bytes)

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
