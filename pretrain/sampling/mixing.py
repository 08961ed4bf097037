"""Who gets which slot, by weight, in closed form: sources within a pairing, pairings among steps.

Shares are exact for ever: after r slots a source of weight w has had w * r of them, rounded down to
whole ones (the largest source has what the others leave). No count is kept anywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from data_prep.errors import InputError
from pretrain.sampling.keyed_random import key_of, newest, permute

# Sources share each row of this many slots in exact proportion to their weights.
MIXING_BLOCK_SLOTS = 4096
# Weights are turned into integers, so that counts are exact for ever.
WEIGHT_PARTS = 10**9
Name = TypeVar("Name", bound=str)


class SourceMixture:
    """The sources of one pairing, mixed with the same weights from one row of slots on.

    In every block of MIXING_BLOCK_SLOTS slots of a lane, each source has its exact share of slots
    (the rounding never adds up to a whole sample), and at every slot the lanes together hold each
    source in proportion, to within one sample per source. So a step's composition is as even as
    whole samples allow.

    Args:
        pairing: its name, for messages.
        source_names: for messages.
        weights: [sources] not negative; only their ratios count.
        lanes: number of lanes.
        first_row: row of every lane's slots at which this mixture begins.
        key_parts: what the keys of its permutations are made of.
    """

    def __init__(
        self,
        pairing: str,
        *,
        source_names: Sequence[str],
        weights: Sequence[float],
        lanes: int,
        first_row: int,
        key_parts: tuple[int | str, ...],
    ) -> None:
        self.lanes = lanes
        self.first_row = first_row
        self._key_parts = key_parts
        total = sum(weights)
        self._parts = [round(weight / total * WEIGHT_PARTS) for weight in weights]
        for name, weight, part in zip(source_names, weights, self._parts, strict=True):
            if weight > 0 and part == 0:
                raise InputError(
                    f"pairing {pairing!r}: the weight of source {name!r} is less than a "
                    f"{WEIGHT_PARTS:,}th of all; raise it, or remove the source"
                )
        self._largest = int(np.argmax(weights))
        self._is_single = sum(weight > 0 for weight in weights) == 1
        self._blocks: dict[tuple[int, range], tuple[np.ndarray, np.ndarray]] = {}

    def draw(
        self, lane_numbers: np.ndarray, rows: np.ndarray, *, lanes: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """(source, samples that this lane took of it before) of each slot; int64 [n].

        Args:
            lane_numbers: int64 [n], within `lanes`.
            rows: int64 [n], each counted from the mixture's first.
            lanes: those of this rank.
        """
        source_numbers = np.full_like(rows, self._largest)
        if self._is_single:
            return source_numbers, rows
        counts = np.empty_like(rows)
        blocks, rows_in_block = np.divmod(rows, MIXING_BLOCK_SLOTS)
        for block in np.unique(blocks).tolist():
            here = blocks == block
            block_sources, block_counts = self._block(block, lanes)
            at = (lane_numbers[here] - lanes.start, rows_in_block[here])
            source_numbers[here] = block_sources[at]
            before = np.array(self._counts_before(block * MIXING_BLOCK_SLOTS))
            counts[here] = before[source_numbers[here]] + block_counts[at]
        return source_numbers, counts

    def counts_by_lane(self, row: int) -> np.ndarray:
        """int64 [lanes, sources]: slots before `row` that each source has in each lane."""
        block, row_in_block = divmod(row, MIXING_BLOCK_SLOTS)
        before = np.array(self._counts_before(block * MIXING_BLOCK_SLOTS), dtype=np.int64)
        counts = np.tile(before, (self.lanes, 1))
        if self._is_single:
            counts[:, self._largest] += row_in_block
        elif row_in_block:
            sources, _ = self._block(block, range(self.lanes))
            for number in range(len(before)):
                counts[:, number] += (sources[:, :row_in_block] == number).sum(axis=1)
        return counts

    def rows_until(self, source: int, needed: np.ndarray) -> int | None:
        """Rows after which every lane has had its number of slots of a source; None: never.

        Args:
            source: number of the source.
            needed: int64 [lanes].
        """
        most = int(needed.max())
        if most <= 0:
            return 0
        if self._parts[source] == 0:
            return None
        enough = most * WEIGHT_PARTS // self._parts[source] // MIXING_BLOCK_SLOTS + 2
        blocks = range(enough)
        after = bisect_left(
            blocks, most, key=lambda block: self._counts_before(block * MIXING_BLOCK_SLOTS)[source]
        )
        block = after - 1  # at its end they have had it, at its beginning not
        before = self._counts_before(block * MIXING_BLOCK_SLOTS)[source]
        if self._is_single:
            return block * MIXING_BLOCK_SLOTS + most - before
        sources, _ = self._block(block, range(self.lanes))
        counts = before + np.cumsum(sources == source, axis=1, dtype=np.int16)  # [lanes, slots]
        has_enough = (counts >= needed[:, None]).all(axis=0)  # [slots]
        return block * MIXING_BLOCK_SLOTS + int(np.argmax(has_enough)) + 1

    def _block(self, block: int, lanes: range) -> tuple[np.ndarray, np.ndarray]:
        found = self._blocks.get((block, lanes))
        if found is None:
            found = self._make_block(block, lanes)
            self._blocks = newest(self._blocks) | {(block, lanes): found}
        return found  # not from the table, which another thread may have replaced

    def _make_block(self, block: int, lanes: range) -> tuple[np.ndarray, np.ndarray]:
        """([lanes, slots] source, [lanes, slots] slots of it before in this block) of one block.

        A slot's source is read off a dial of MIXING_BLOCK_SLOTS marks on which every source owns an
        arc. Along a lane the block visits every mark once, in a keyed order; the lanes stand evenly
        spread around the dial.
        """
        before = self._counts_before(block * MIXING_BLOCK_SLOTS)
        after = self._counts_before((block + 1) * MIXING_BLOCK_SLOTS)
        arcs = [end - start for end, start in zip(after, before, strict=True)]
        source_at_mark = np.repeat(np.arange(len(arcs), dtype=np.uint8), arcs)
        key = key_of(*self._key_parts, block)
        marks = permute(np.arange(MIXING_BLOCK_SLOTS), sizes=MIXING_BLOCK_SLOTS, keys=key)
        spread = permute(np.asarray(lanes), sizes=self.lanes, keys=key)
        turns = spread * MIXING_BLOCK_SLOTS // self.lanes
        sources = source_at_mark[(marks[None, :] + turns[:, None]) % MIXING_BLOCK_SLOTS]
        counts = np.empty(sources.shape, dtype=np.int16)
        for number in range(len(arcs)):
            here = sources == number
            counts[here] = (np.cumsum(here, axis=1, dtype=np.int16) - 1)[here]
        return sources, counts

    def _counts_before(self, row: int) -> list[int]:
        """Slots of one lane before `row` that belong to each source, where a block begins: floors,
        and the largest source takes what they leave."""
        counts = [part * row // WEIGHT_PARTS for part in self._parts]
        counts[self._largest] += row - sum(counts)
        return counts


class PairingChoice:
    """Which pairings a step takes: all of them, or one, as evenly spread as their weights allow.

    With one per step, the first pairing takes step t where floor((t + 1) w) > floor(t w) for its
    share w (a Beatty sequence); the others divide what it leaves in the same way.

    Args:
        weights: of every pairing.
        takes_all: every step takes all.
    """

    def __init__(self, weights: Mapping[Name, float], *, takes_all: bool) -> None:
        self.names = list(weights)
        self.takes_all = takes_all
        total = sum(weights.values())
        self._parts = [round(weight / total * WEIGHT_PARTS) for weight in weights.values()]

    def pairings_of_step(self, step: int) -> list[Name]:
        """The pairings that step 0, 1, ... takes."""
        if self.takes_all:
            return self.names
        before, after = self.num_taken(step), self.num_taken(step + 1)
        return [name for name in self.names if after[name] > before[name]]

    def steps_until(self, name: Name, num_taken: int) -> int:
        """The run's steps after which so many have taken a pairing."""
        if self.takes_all:
            return num_taken
        part = self._parts[self.names.index(name)]
        enough = (num_taken + len(self.names)) * WEIGHT_PARTS * 2 // part + 1
        return bisect_left(range(enough), num_taken, key=lambda step: self.num_taken(step)[name])

    def num_taken(self, num_steps: int) -> dict[Name, int]:
        """Of the first `num_steps` steps, how many take each pairing."""
        if self.takes_all:
            return dict.fromkeys(self.names, num_steps)
        taken, steps_left, parts_left = {}, num_steps, sum(self._parts)
        for name, part in zip(self.names, self._parts, strict=True):
            taken[name] = steps_left * part // parts_left
            steps_left -= taken[name]
            parts_left -= part
        return taken
