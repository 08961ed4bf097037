"""Reads one source's samples by ordinal, and replaces those whose bytes are bad.

A sample that fails its checksum or does not decode is replaced by a neighbour in its dataset that
depends on the bad sample's place alone: the same one on every rank, in every epoch and attempt. The
replacement is recorded. A file that cannot be read at all is an error that stops the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.config_file import InputError
from data_prep.media_decode import MediaError
from data_prep.shard_format import CorruptSampleError, captions_of, media_extension_of
from data_prep.subset import KeptSamples
from pretrain.keyed_random import key_of, permute
from pretrain.media_transforms import MediaTransform

MAX_SUBSTITUTES = 16
# A substitute is found at least within this many neighbours, however small the window.
MIN_REACH = 64


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
    ordinal: int
    substitute: int
    reason: str


class PairReader:
    """Decoded pairs of one source, by ordinal.

    Args:
        source: its name.
        samples: of its dataset, all or what a subset keeps.
        kind: of media that it must hold.
        transform: decodes its kind of media.
        window: samples among which a substitute is found (at least MIN_REACH).

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
        window: int,
    ) -> None:
        self.source = source
        self.samples = samples
        self.dataset = samples.dataset
        self.transform = transform
        self.reach = max(window, MIN_REACH)
        if self.dataset.info.media != kind:
            raise InputError(
                f"source {source!r}: expected a dataset of {kind}, found {self.dataset.info.media} "
                f"in {self.dataset.folder}"
            )

    def read(self, ordinal: int) -> tuple[Pair, list[BadSample]]:
        """The pair, or its substitute and why.

        Raises:
            InputError: neither it nor its substitutes can be decoded.
            OSError: the shard cannot be read.
        """
        reason, num_tried = "", 0
        for candidate in self._candidates(ordinal):
            try:
                pair = self.read_exactly(candidate)
            except (CorruptSampleError, MediaError) as error:
                reason, num_tried = reason or str(error), num_tried + 1
                continue
            if not reason:
                return pair, []
            return pair, [BadSample(self.source, ordinal, candidate, reason)]
        raise InputError(
            f"source {self.source!r}: neither this sample nor {num_tried - 1} neighbours can be "
            f"read: {reason}"
        )

    def read_exactly(self, ordinal: int) -> Pair:
        """The pair, without substitution.

        Raises:
            CorruptSampleError, MediaError: its bytes are bad.
        """
        sample = self.dataset.read_sample(ordinal)
        kind = self.dataset.info.media
        extension = media_extension_of(sample.members, kind)
        if extension is None:
            raise CorruptSampleError(f"{sample}: no {kind} among {sorted(sample.members)}")
        try:
            media = self.transform.decode(sample.members[extension], extension)
        except MediaError as error:
            raise MediaError(f"{sample}: .{extension}: {error}") from None
        return Pair(ordinal, media, captions_of(sample))

    def _candidates(self, ordinal: int) -> Iterator[int]:
        """The sample, then neighbours among the kept ones, in the order they are tried."""
        yield ordinal
        rank = int(self.samples.ranks_of([ordinal])[0])
        start = rank // self.reach * self.reach
        size = min(self.reach, len(self.samples) - start)
        if size < 2:
            return
        steps = np.arange(min(MAX_SUBSTITUTES, size - 1))
        distances = 1 + permute(steps, sizes=size - 1, keys=key_of("substitute", ordinal))
        yield from self.samples.ordinals_of(start + (rank - start + distances) % size).tolist()
