"""Which samples are in step t: a pure function of config, shard sizes and t, without any state.

A source's samples are put in order, for each epoch anew, in four moves (SourceOrder):

    1. its shards are permuted and their samples laid end to end on an axis of N places;
    2. the axis is rotated, so that the N mod lanes samples left over differ between epochs;
    3. the axis is cut into as many equal ranges as there are lanes: lane c owns range c;
    4. inside a lane, each window of neighbouring places is permuted by a keyed bijection.

A pairing mixes its sources slot by slot (PairingOrder): lane c is an endless row of slots, and a
step takes the next `global_batch_size / lanes` slots of every lane. Which rank carries a lane, and
how many ranks there are, never enters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.config_file import InputError
from data_prep.subset import KeptSamples
from pretrain.keyed_random import key_of, permute, scramble

# Sources share each row of this many slots in exact proportion to their weights.
MIXING_BLOCK_SLOTS = 4096
MAX_SOURCES = 64
NUM_TABLES_KEPT = 8
# Weights are turned into integers, so that counts are exact for ever.
WEIGHT_PARTS = 10**9


def _newest(tables: dict) -> dict:
    """The last few of the tables made so far: steps move through epochs and blocks in order."""
    return dict(list(tables.items())[-NUM_TABLES_KEPT:])


# ------------------------------------------------------------------------------------ a source


class SourceOrder:
    """The endless row of samples that every lane reads from one source.

    Args:
        name: the source's name; part of every key.
        shard_sizes: [shards] samples per shard; of a subset, those that it keeps.
        lanes: number of lanes.
        window: samples of a lane that are shuffled among themselves; 1 reads in shard order, and
            anything from the lane's length on shuffles the whole lane.
        seed: the run's seed.
        samples: turns places in these shards into ordinals of the dataset, where only a subset of
            its samples is kept.

    Raises:
        InputError: the source has fewer samples than lanes.
    """

    def __init__(
        self,
        name: str,
        *,
        shard_sizes: Sequence[int],
        lanes: int,
        window: int,
        seed: int,
        samples: KeptSamples | None = None,
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
        """(epoch, ordinal) of the sample at each (lane, position); positions are unbounded.

        Args:
            lanes: int64 [n].
            positions: int64 [n], each counted from the run's beginning in its lane.
        """
        epochs, places = np.divmod(positions, self.lane_length)
        places = self._shuffle_windows(lanes, epochs, places)
        ranks = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            shard_order, axis_starts, rotation = self.epoch_axis(epoch)
            axis = lanes[here] * self.lane_length + places[here] + rotation
            axis %= self.num_samples
            nth = np.searchsorted(axis_starts, axis, side="right") - 1
            ranks[here] = self.shard_starts[shard_order[nth]] + axis - axis_starts[nth]
        return epochs, ranks if self.samples is None else self.samples.ordinals_of(ranks)

    def _shuffle_windows(
        self, lanes: np.ndarray, epochs: np.ndarray, places: np.ndarray
    ) -> np.ndarray:
        windows = places // self.window
        starts = windows * self.window
        sizes = np.minimum(self.window, self.lane_length - starts)
        keys = np.full(places.shape, key_of(self.seed, "window", self.name), dtype=np.uint64)
        for part in (lanes, epochs, windows):
            keys = scramble(keys ^ part.astype(np.uint64))
        return starts + permute(places - starts, sizes=sizes, keys=keys)

    def epoch_axis(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        """(shards in this epoch's order, where each begins on the axis, rotation of the axis)."""
        if epoch not in self._epoch_axes:
            self._epoch_axes = _newest(self._epoch_axes) | {epoch: self._make_epoch_axis(epoch)}
        return self._epoch_axes[epoch]

    def _make_epoch_axis(self, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
        key = np.uint64(key_of(self.seed, "shards", self.name, epoch))
        numbers = np.arange(len(self.shard_sizes), dtype=np.uint64)
        shard_order = np.argsort(scramble(scramble(numbers) ^ key), kind="stable")
        shard_order = shard_order[self.shard_sizes[shard_order] > 0]
        sizes = self.shard_sizes[shard_order]
        rotation = key_of(self.seed, "rotation", self.name, epoch) % self.num_samples
        return shard_order, np.cumsum(sizes) - sizes, rotation


# ----------------------------------------------------------------------------------- a pairing


@dataclass(frozen=True)
class StepSamples:
    """What a step reads, in the order of the slots of the global batch."""

    slots: np.ndarray  # int64 [B] place in the global batch
    sources: np.ndarray  # int64 [B] number of the source
    epochs: np.ndarray  # int64 [B] epoch of that source
    ordinals: np.ndarray  # int64 [B] sample of that source


class PairingOrder:
    """Mixes the sources of one pairing, by weight, and cuts the mixture into steps.

    In every block of MIXING_BLOCK_SLOTS slots of a lane, each source has its exact share of slots
    (the rounding never adds up to a whole sample), and at every slot the lanes together hold each
    source in proportion, to within one sample per source. So a step's composition is as even as
    whole samples allow.

    Args:
        name: the pairing's name; part of every key.
        sources: their orders, all with the same lanes.
        weights: [sources] positive; only their ratios count.
        global_batch_size: pairs per step, a multiple of the lanes.
        seed: the run's seed.
    """

    def __init__(
        self,
        name: str,
        *,
        sources: Sequence[SourceOrder],
        weights: Sequence[float],
        global_batch_size: int,
        seed: int,
    ) -> None:
        if len(sources) > MAX_SOURCES:
            raise InputError(f"pairing {name!r}: {len(sources)} sources, at most {MAX_SOURCES}")
        self.name = name
        self.sources = list(sources)
        self.lanes = sources[0].lanes
        self.slots_per_lane = global_batch_size // self.lanes
        self.seed = seed
        total = sum(weights)
        self._parts = [round(weight / total * WEIGHT_PARTS) for weight in weights]
        for source, part in zip(self.sources, self._parts, strict=True):
            if part == 0:
                raise InputError(
                    f"pairing {name!r}: the weight of source {source.name!r} is less than a "
                    f"{WEIGHT_PARTS:,}th of all; raise it, or remove the source"
                )
        self._largest = int(np.argmax(weights))
        self._mixing_blocks: dict[tuple[int, range], tuple[np.ndarray, np.ndarray]] = {}

    def samples_of_step(self, step: int, *, lanes: range) -> StepSamples:
        """The samples of one step that the given lanes hold, lane after lane."""
        lane_numbers = np.repeat(np.arange(lanes.start, lanes.stop), self.slots_per_lane)
        nth = np.tile(np.arange(self.slots_per_lane), len(lanes))
        rows = step * self.slots_per_lane + nth
        source_numbers, positions = self._mix(lane_numbers, rows, lanes)
        epochs, ordinals = np.empty_like(rows), np.empty_like(rows)
        for number, source in enumerate(self.sources):
            here = source_numbers == number
            epochs[here], ordinals[here] = source.samples_at(lane_numbers[here], positions[here])
        slots = lane_numbers * self.slots_per_lane + nth
        return StepSamples(slots, source_numbers, epochs, ordinals)

    def samples_drawn(self, num_steps: int) -> list[int]:
        """Samples that each source has given after `num_steps` steps, to within one per lane."""
        return [count * self.lanes for count in self._drawn_before(num_steps * self.slots_per_lane)]

    def _mix(
        self, lane_numbers: np.ndarray, rows: np.ndarray, lanes: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """(source, position in that source's lane) of each (lane, row of the lane)."""
        if len(self.sources) == 1:
            return np.zeros_like(rows), rows
        source_numbers, positions = np.empty_like(rows), np.empty_like(rows)
        blocks, rows_in_block = np.divmod(rows, MIXING_BLOCK_SLOTS)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            block_sources, block_positions = self._mixing_block(block, lanes)
            at = (lane_numbers[here] - lanes.start, rows_in_block[here])
            source_numbers[here] = block_sources[at]
            positions[here] = block_positions[at]
        return source_numbers, positions

    def _mixing_block(self, block: int, lanes: range) -> tuple[np.ndarray, np.ndarray]:
        if (block, lanes) not in self._mixing_blocks:
            made = {(block, lanes): self._make_mixing_block(block, lanes)}
            self._mixing_blocks = _newest(self._mixing_blocks) | made
        return self._mixing_blocks[block, lanes]

    def _make_mixing_block(self, block: int, lanes: range) -> tuple[np.ndarray, np.ndarray]:
        """([lanes, slots] source, [lanes, slots] position in that source's lane) of one block.

        A slot's source is read off a dial of MIXING_BLOCK_SLOTS marks on which every source owns an
        arc. Along a lane the block visits every mark once, in a keyed order; the lanes stand evenly
        spread around the dial.
        """
        before = self._drawn_before(block * MIXING_BLOCK_SLOTS)
        after = self._drawn_before((block + 1) * MIXING_BLOCK_SLOTS)
        arc_ends = np.cumsum([a - b for a, b in zip(after, before, strict=True)])
        key = key_of(self.seed, "mixing", self.name, block)
        marks = permute(np.arange(MIXING_BLOCK_SLOTS), sizes=MIXING_BLOCK_SLOTS, keys=key)
        spread = permute(np.asarray(lanes), sizes=self.lanes, keys=key)
        turns = spread * MIXING_BLOCK_SLOTS // self.lanes
        dial = (marks[None, :] + turns[:, None]) % MIXING_BLOCK_SLOTS
        sources = np.searchsorted(arc_ends, dial, side="right")
        positions = np.empty_like(sources)
        for number, start in enumerate(before):
            here = sources == number
            positions[here] = (start + np.cumsum(here, axis=1) - 1)[here]
        return sources, positions

    def _drawn_before(self, row: int) -> list[int]:
        """Slots of one lane before `row` that belong to each source: floors, and the largest source
        takes what they leave."""
        drawn = [part * row // WEIGHT_PARTS for part in self._parts]
        drawn[self._largest] += row - sum(drawn)
        return drawn


# ------------------------------------------------------------------------------- ranks, digest


def lanes_of_rank(rank: int, *, world_size: int, lanes: int) -> range:
    """The neighbouring lanes a rank carries: floor or ceil of lanes / world_size.

    Raises:
        InputError: there are more ranks than lanes.
    """
    if world_size > lanes:
        raise InputError(
            f"{world_size} processes for lanes={lanes}: expected at most one process per lane; "
            f"start at most {lanes} processes, or set lanes to {world_size} or more"
        )
    return range(rank * lanes // world_size, (rank + 1) * lanes // world_size)


def digest_halves(samples: StepSamples, *, source_keys: Sequence[int]) -> np.ndarray:
    """int64 [2]: this rank's share of the digest of a step's sample ids.

    The sum over ranks is the same for any number of ranks; `format_digest` shortens it.
    """
    keys = np.array(source_keys, dtype=np.uint64)[samples.sources]
    for part in (samples.slots, samples.epochs, samples.ordinals):
        keys = scramble(keys ^ part.astype(np.uint64))
    low, high = keys & np.uint64(0xFFFFFFFF), keys >> np.uint64(32)
    return np.array([low.sum(), high.sum()], dtype=np.int64)


def format_digest(summed_halves: Sequence[int]) -> str:
    """16 hexadecimal digits of the summed `digest_halves` of all ranks."""
    low, high = (int(half) & 0xFFFFFFFF for half in summed_halves)
    return f"{high:08x}{low:08x}"
