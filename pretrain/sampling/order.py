"""Sample order: the samples of step t as a pure function of config, shard sizes and t.

Each epoch orders a source's samples in four moves (SourceOrder):

    1. shards are permuted, and their samples laid end to end on an axis of length N;
    2. the axis is rotated by a keyed number, which chooses the N mod lanes samples left over;
    3. the axis is cut into equal ranges, one per lane;
    4. inside a lane, each window of neighbouring indices is permuted by a keyed bijection.

A stream mixes its sources slot by slot (StreamOrder, with sampling.mixing). A lane is an endless
sequence of slots, and a step takes the next `global_batch_size / lanes` slots of every lane. The
number of ranks, and the rank that carries a lane, do not matter.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from data_prep.errors import InputError
from pretrain.sampling.keyed_random import key_of, newest, permute, scramble
from pretrain.sampling.mixing import SourceMixture

MAX_SOURCES = 64


# ------------------------------------------------------------------------------------ a source


class KeptOrdinals(Protocol):
    """The kept samples of a dataset, such as `data_prep.shards.subset.KeptSamples`."""

    def ordinals_of(self, ranks: np.ndarray) -> np.ndarray:
        """Returns int64 [n], the ordinals in the dataset of kept samples numbered from 0."""


class SourceOrder:
    """Endless sequence of samples that every lane reads from one source.

    Args:
        name: the source's name; part of every key.
        shard_sizes: [shards] samples per shard; with a subset, the kept ones.
        lanes: number of lanes.
        window: samples of a lane that are shuffled among themselves. 1 reads in shard order, and a
            window of at least the lane's length shuffles the whole lane.
        seed: the run's seed.
        samples: ordinals of the kept samples; None if all are kept.

    Raises:
        InputError: if the source has fewer samples than lanes.
    """

    def __init__(
        self,
        name: str,
        *,
        shard_sizes: Sequence[int],
        lanes: int,
        window: int,
        seed: int,
        samples: KeptOrdinals | None = None,
    ) -> None:
        self.name = name
        self.samples = samples
        self.lanes = lanes
        self.window = window
        self.seed = seed
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.shard_starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        self.num_samples = int(self.shard_sizes.sum())
        self.lane_length = self.num_samples // lanes
        if self.lane_length == 0:
            raise InputError(
                f"source {name!r} has {self.num_samples} samples, fewer than lanes={lanes}; "
                f"set lanes to at most {self.num_samples}"
            )
        self._epoch_axes: dict[int, tuple[np.ndarray, np.ndarray, int]] = {}

    def samples_at(self, lanes: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64 [n] each: epoch and ordinal of the sample at each (lane, position).

        Args:
            lanes: int64 [n], lanes.
            positions: int64 [n], samples that the lane read before, since the run's beginning.
        """
        epochs, indices = np.divmod(positions, self.lane_length)
        indices = self._shuffle_windows(lanes, epochs, indices)
        ranks = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shard_order, axis_starts, rotation = self.epoch_axis(epoch)
            axis = lanes[here] * self.lane_length + indices[here] + rotation
            axis %= self.num_samples
            nth = np.searchsorted(axis_starts, axis, side="right") - 1
            ranks[here] = self.shard_starts[shard_order[nth]] + axis - axis_starts[nth]
        return epochs, ranks if self.samples is None else self.samples.ordinals_of(ranks)

    def _shuffle_windows(
        self, lanes: np.ndarray, epochs: np.ndarray, indices: np.ndarray
    ) -> np.ndarray:
        windows = indices // self.window
        starts = windows * self.window
        sizes = np.minimum(self.window, self.lane_length - starts)
        keys = np.full(indices.shape, key_of(self.seed, "window", self.name), dtype=np.uint64)
        for part in (lanes, epochs, windows):
            keys = scramble(keys ^ part.astype(np.uint64))
        return starts + permute(indices - starts, sizes=sizes, keys=keys)

    def epoch_axis(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Returns (shards in the epoch's order, their starts on the axis, rotation of the axis)."""
        found = self._epoch_axes.get(epoch)
        if found is None:
            found = self._make_epoch_axis(epoch)
            self._epoch_axes = newest(self._epoch_axes) | {epoch: found}
        return found  # not from the table, which another thread may have replaced

    def _make_epoch_axis(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        key = np.uint64(key_of(self.seed, "shards", self.name, epoch))
        numbers = np.arange(len(self.shard_sizes), dtype=np.uint64)
        shard_order = np.argsort(scramble(scramble(numbers) ^ key), kind="stable")
        shard_order = shard_order[self.shard_sizes[shard_order] > 0]
        sizes = self.shard_sizes[shard_order]
        rotation = key_of(self.seed, "rotation", self.name, epoch) % self.num_samples
        return shard_order, np.cumsum(sizes) - sizes, rotation


# ----------------------------------------------------------------------------------- a stream


@dataclass(frozen=True)
class StepSamples:
    """Samples of a step, in the order of the slots of the global batch."""

    slots: np.ndarray  # int64 [B] slot in the global batch
    sources: np.ndarray  # int64 [B] index of the source
    epochs: np.ndarray  # int64 [B] epoch of the source
    ordinals: np.ndarray  # int64 [B] sample of the source

    def __len__(self) -> int:
        return len(self.slots)


@dataclass(frozen=True)
class Segment:
    """Weights of all sources from a step on."""

    from_step: int
    weights: Sequence[float]  # [sources]; 0 if a source is not used


class StreamOrder:
    """Mixture of the sources of one stream, by weight, cut into steps.

    Only steps that take this stream are counted. When a segment begins, every source continues in
    every lane where it was, and the mixing counts from zero.

    Args:
        name: the stream's name; part of every key.
        sources: orders of its sources, all with the same lanes.
        segments: weights by step; the first begins at step 0.
        global_batch_size: pairs per step, a multiple of the lanes.
        seed: the run's seed.
    """

    def __init__(
        self,
        name: str,
        *,
        sources: Sequence[SourceOrder],
        segments: Sequence[Segment],
        global_batch_size: int,
        seed: int,
    ) -> None:
        if len(sources) > MAX_SOURCES:
            raise InputError(f"stream {name!r}: {len(sources)} sources, at most {MAX_SOURCES}")
        self.name = name
        self.sources = list(sources)
        self.lanes = sources[0].lanes
        self.global_batch_size = global_batch_size
        self.slots_per_lane = global_batch_size // self.lanes
        self._mixtures = [
            self._mixture(segment, is_first=number == 0, seed=seed)
            for number, segment in enumerate(segments)
        ]
        # [segments] int64 [lanes, sources]: samples drawn before the segment
        self._drawn: list[np.ndarray] = [np.zeros((self.lanes, len(sources)), dtype=np.int64)]
        for earlier, later in pairwise(self._mixtures):
            rows = later.first_row - earlier.first_row
            self._drawn.append(self._drawn[-1] + earlier.counts_by_lane(rows))

    def _mixture(self, segment: Segment, *, is_first: bool, seed: int) -> SourceMixture:
        return SourceMixture(
            self.name,
            source_names=[source.name for source in self.sources],
            weights=segment.weights,
            lanes=self.lanes,
            first_row=segment.from_step * self.slots_per_lane,
            key_parts=(seed, "mixing", self.name, *(() if is_first else (segment.from_step,))),
        )

    def samples_of_step(self, step: int, *, lanes: range) -> StepSamples:
        """Returns the samples of a step that some lanes hold, lane after lane."""
        lane_numbers = np.repeat(np.arange(lanes.start, lanes.stop), self.slots_per_lane)
        nth = np.tile(np.arange(self.slots_per_lane), len(lanes))
        rows = step * self.slots_per_lane + nth
        number = self._segment_at(step)
        mixture, drawn = self._mixtures[number], self._drawn[number]
        source_numbers, counts = mixture.draw(lane_numbers, rows - mixture.first_row)
        positions = drawn[lane_numbers, source_numbers] + counts
        epochs, ordinals = np.empty_like(rows), np.empty_like(rows)
        for number in np.unique(source_numbers).tolist():
            here = source_numbers == number
            source = self.sources[number]
            epochs[here], ordinals[here] = source.samples_at(lane_numbers[here], positions[here])
        slots = lane_numbers * self.slots_per_lane + nth
        return StepSamples(slots, source_numbers, epochs, ordinals)

    @property
    def segment_steps(self) -> list[int]:
        """First step of each segment."""
        return [mixture.first_row // self.slots_per_lane for mixture in self._mixtures]

    def _segment_at(self, step: int) -> int:
        row = step * self.slots_per_lane
        return max(n for n, mixture in enumerate(self._mixtures) if mixture.first_row <= row)

    def lane_positions(self, step: int) -> np.ndarray:
        """Returns int64 [lanes, sources], the samples that each lane drew before `step`."""
        number = self._segment_at(step)
        mixture = self._mixtures[number]
        row = step * self.slots_per_lane - mixture.first_row
        return self._drawn[number] + mixture.counts_by_lane(row)

    def samples_drawn(self, num_steps: int) -> list[int]:
        """Returns [sources], the samples of each source in the first `num_steps` steps."""
        return self.lane_positions(num_steps).sum(axis=0).tolist()

    def samples_drawn_of_epoch(self, num_steps: int, *, source: int, epoch: int) -> int:
        """Counts the samples of one epoch of a source in the first `num_steps` steps."""
        length = self.sources[source].lane_length
        positions = self.lane_positions(num_steps)[:, source]
        return int(np.clip(positions - epoch * length, 0, length).sum())

    def steps_to_end_of(self, *, source: int, epoch: int) -> int | None:
        """Returns the steps after which every lane has left an epoch of a source; None if never."""
        end = (epoch + 1) * self.sources[source].lane_length
        for number, mixture in enumerate(self._mixtures):
            rows = mixture.rows_until(source, end - self._drawn[number][:, source])
            is_last = number + 1 == len(self._mixtures)
            if rows is None or (
                not is_last and mixture.first_row + rows > self._mixtures[number + 1].first_row
            ):
                continue
            return -(-(mixture.first_row + rows) // self.slots_per_lane)
        return None

    def epochs_seen(self, num_steps: int) -> dict[str, float]:
        """Returns source name -> mean number of times that its samples were drawn."""
        drawn = self.samples_drawn(num_steps)
        return {
            source.name: count / source.num_samples
            for source, count in zip(self.sources, drawn, strict=True)
        }


# ------------------------------------------------------------------------------- ranks, digest


def lanes_of_rank(rank: int, *, world_size: int, lanes: int) -> range:
    """Returns the neighbouring lanes that a rank carries: floor or ceil of lanes / world_size.

    Raises:
        InputError: if there are more ranks than lanes.
    """
    if world_size > lanes:
        raise InputError(
            f"{world_size} processes for lanes={lanes}: expected at most one process per lane; "
            f"start at most {lanes} processes, or set lanes to {world_size} or more"
        )
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


@functools.cache
def pairs_of_ranks(slots_per_lane: int, *, world_size: int, lanes: int) -> tuple[int, ...]:
    """Returns [ranks], the pairs of each rank in a step that takes the stream.

    Raises:
        InputError: if there are more ranks than lanes.
    """
    carried = (
        lanes_of_rank(rank, world_size=world_size, lanes=lanes) for rank in range(world_size)
    )
    return tuple(len(own) * slots_per_lane for own in carried)


def source_key(stream: str, source: str) -> int:
    """Returns the 64-bit key that stands for a source in digests and media keys."""
    return key_of("source", stream, source)


def digest_halves(samples: StepSamples, *, source_keys: Sequence[int]) -> np.ndarray:
    """Returns int64 [2], this rank's summand of the digest of a step's sample ids.

    The sum over ranks does not depend on their number; `format_digest` makes it a text.
    """
    keys = np.array(source_keys, dtype=np.uint64)[samples.sources]
    for part in (samples.slots, samples.epochs, samples.ordinals):
        keys = scramble(keys ^ part.astype(np.uint64))
    low, high = keys & np.uint64(0xFFFFFFFF), keys >> np.uint64(32)
    return np.array([low.sum(), high.sum()], dtype=np.int64)


def format_digest(summed_halves: Sequence[int]) -> str:
    """Formats the sum of all ranks' `digest_halves` as 16 hexadecimal digits."""
    low, high = (int(half) & 0xFFFFFFFF for half in summed_halves)
    return f"{high:08x}{low:08x}"
