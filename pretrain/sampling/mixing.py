"""Weighted mixing as a closed-form function of the step: sources in a pairing, pairings in steps.

Fractions stay exact: of r slots, a source with the fraction w of all weight gets w * r, rounded
down. The largest source gets the rest. No count is kept anywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from data_prep.errors import InputError
from pretrain.sampling.keyed_random import key_of, newest, permute

# Within each block of so many slots of a lane, sources are mixed in exact proportion.
MIXING_BLOCK_SLOTS = 4096
# Weights are turned into integers, so that counts stay exact in runs of any length.
WEIGHT_PARTS = 10**9
Name = TypeVar("Name", bound=str)


class SourceMixture:
    """Sources of one pairing, mixed with constant weights from one row of slots on.

    Row r is slot r of every lane. In every block of MIXING_BLOCK_SLOTS slots of a lane, each source
    has its exact fraction of slots; rounding errors do not add up. In every row, the lanes together
    hold each source in proportion, to within one sample. So a step's composition is as even as
    whole samples allow.

    Args:
        pairing: the pairing's name, for messages.
        source_names: [sources] names, for messages.
        weights: [sources] non-negative weights; only their ratios count.
        lanes: number of lanes.
        first_row: first row of this mixture.
        key_parts: parts of the keys of its permutations.
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
                    f"{WEIGHT_PARTS:,}th of all weights; raise it, or remove the source"
                )
        self._largest = int(np.argmax(weights))
        self._is_single = sum(weight > 0 for weight in weights) == 1
        self._blocks: dict[tuple[int, range], tuple[np.ndarray, np.ndarray]] = {}

    def draw(
        self, lane_numbers: np.ndarray, rows: np.ndarray, *, lanes: range
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64 [n] each: a slot's source, and the samples its lane took of it before.

        Args:
            lane_numbers: int64 [n], lanes of the slots, within `lanes`.
            rows: int64 [n], rows of the slots, counted from the mixture's first.
            lanes: lanes that this rank carries.
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
        """Returns int64 [lanes, sources], the slots before `row` that each source has in a lane."""
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
        """Returns the rows after which every lane has had some number of slots of a source.

        Args:
            source: index of the source.
            needed: int64 [lanes], slots that each lane needs.

        Returns:
            The number of rows, or None if the source has no weight.
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
        block = after - 1  # they have had it at its end, but not at its beginning
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
        """([lanes, slots] source, [lanes, slots] earlier slots of that source in this block).

        Picture a dial of MIXING_BLOCK_SLOTS marks, on which every source owns an arc in proportion
        to its weight. A lane visits every mark once per block, in a keyed order. In every row, the
        lanes are spread evenly around the dial.
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
        """Slots of a lane before `row`, the first row of a block, that belong to each source.

        Counts are rounded down; the largest source gets the rest.
        """
        counts = [part * row // WEIGHT_PARTS for part in self._parts]
        counts[self._largest] += row - sum(counts)
        return counts


class PairingChoice:
    """Choice of the pairings that a step takes: all, or one, spread as evenly as weights allow.

    With one per step, let w be the first pairing's fraction of all weight. It takes step t if
    floor((t + 1) w) > floor(t w), a Beatty sequence. The others divide the other steps likewise.

    Args:
        weights: weight of every pairing.
        takes_all: whether every step takes all pairings.
    """

    def __init__(self, weights: Mapping[Name, float], *, takes_all: bool) -> None:
        self.names = list(weights)
        self.takes_all = takes_all
        total = sum(weights.values())
        self._parts = [round(weight / total * WEIGHT_PARTS) for weight in weights.values()]

    def pairings_of_step(self, step: int) -> list[Name]:
        """Returns the pairings that a step takes; steps count from 0."""
        if self.takes_all:
            return self.names
        before, after = self.num_taken(step), self.num_taken(step + 1)
        return [name for name in self.names if after[name] > before[name]]

    def steps_until(self, name: Name, num_taken: int) -> int:
        """Returns the smallest number of first steps that take a pairing `num_taken` times."""
        if self.takes_all:
            return num_taken
        part = self._parts[self.names.index(name)]
        enough = (num_taken + len(self.names)) * WEIGHT_PARTS * 2 // part + 1
        return bisect_left(range(enough), num_taken, key=lambda step: self.num_taken(step)[name])

    def num_taken(self, num_steps: int) -> dict[Name, int]:
        """Returns, for each pairing, how many of the first `num_steps` steps take it."""
        if self.takes_all:
            return dict.fromkeys(self.names, num_steps)
        taken, steps_left, parts_left = {}, num_steps, sum(self._parts)
        for name, part in zip(self.names, self._parts, strict=True):
            taken[name] = steps_left * part // parts_left
            steps_left -= taken[name]
            parts_left -= part
        return taken
