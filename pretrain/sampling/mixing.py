"""Weighted mixing as a closed-form function of the step: sources in a stream, streams in steps.

Weights become integers with the sum WEIGHT_PARTS, and counts are integers, so neither depends on
the machine. No count is kept anywhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np

from data_prep.errors import InputError
from pretrain.sampling.keyed_random import key_of

# Resolution of the weights. The square fits into int64 (SourceSplit).
WEIGHT_PARTS = 10**9
# Version of the order of mixed sources; a run of another version is refused. Version 1 mixed in
# blocks of 4,096 slots of a lane.
MIXING_VERSION = 2
MAX_ROWS = 2**62
# Bases of the phases of the splits at each depth: enough for 2**16 sources
PHASE_BASES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53)
Name = TypeVar("Name", bound=str)


class SourceMixture:
    """Sources of one stream, mixed with constant weights from one row of slots on.

    Row r is slot r of every lane. A binary tree of SourceSplits divides the slots of a lane evenly.
    Let d be the depth of the tree, log2(sources) rounded up.
    After any number of rows, the count of a source differs from its fraction of the slots

        in each lane                 by less than d,
        in all lanes, two sources    by less than 1,
        in all lanes, more sources   by less than 1 + (d - 1) * (1 + log2(lanes)).

    The first two follow from the formula. The third is measured: random weights reach about
    half of it.

    Args:
        stream: the stream's name, for messages.
        source_names: [sources] names, for messages.
        weights: [sources] non-negative weights; only their ratios count.
        lanes: number of lanes.
        first_row: first row of this mixture.
        key_parts: parts of the key that chooses the lane with the smallest phase.
    """

    def __init__(
        self,
        stream: str,
        *,
        source_names: Sequence[str],
        weights: Sequence[float],
        lanes: int,
        first_row: int,
        key_parts: tuple[int | str, ...],
    ) -> None:
        self.lanes = lanes
        self.first_row = first_row
        self.parts = integer_parts(weights)
        for name, weight, part in zip(source_names, weights, self.parts, strict=True):
            if weight > 0:
                _refuse_vanishing(
                    part, f"stream {stream!r}: the weight of source {name!r}", "the source"
                )
        used = [number for number, part in enumerate(self.parts) if part > 0]
        self._tree = self._split(used, depth=0, turn=key_of(*key_parts) % lanes)

    def _split(self, sources: list[int], *, depth: int, turn: int) -> SourceSplit | int:
        if len(sources) == 1:
            return sources[0]
        half = (len(sources) + 1) // 2
        left, right = sources[:half], sources[half:]
        left_parts = sum(self.parts[number] for number in left)
        all_parts = left_parts + sum(self.parts[number] for number in right)
        ranks = np.roll(spread_ranks(self.lanes, base=PHASE_BASES[depth]), turn)
        return SourceSplit(
            left_parts,
            all_parts,
            ranks * all_parts // self.lanes,
            self._split(left, depth=depth + 1, turn=turn),
            self._split(right, depth=depth + 1, turn=turn),
        )

    def draw(self, lane_numbers: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64 [n] each: a slot's source, and the samples its lane took of it before.

        Args:
            lane_numbers: int64 [n], lanes of the slots.
            rows: int64 [n], rows of the slots, counted from the mixture's first.
        """
        source_numbers, counts = np.empty_like(rows), np.empty_like(rows)
        left_to_do = [(self._tree, np.arange(len(rows)), rows)]
        while left_to_do:
            node, slots, before = left_to_do.pop()
            if isinstance(node, int):
                source_numbers[slots], counts[slots] = node, before
                continue
            to_left = node.num_left(lane_numbers[slots], before)
            is_left = node.num_left(lane_numbers[slots], before + 1) > to_left
            left_to_do.append((node.left, slots[is_left], to_left[is_left]))
            left_to_do.append((node.right, slots[~is_left], (before - to_left)[~is_left]))
        return source_numbers, counts

    def counts_by_lane(self, row: int) -> np.ndarray:
        """Returns int64 [lanes, sources], the slots before `row` that each source has in a lane."""
        counts = np.zeros((self.lanes, len(self.parts)), dtype=np.int64)
        lane_numbers = np.arange(self.lanes)
        left_to_do = [(self._tree, np.full(self.lanes, row, dtype=np.int64))]
        while left_to_do:
            node, before = left_to_do.pop()
            if isinstance(node, int):
                counts[:, node] = before
                continue
            to_left = node.num_left(lane_numbers, before)
            left_to_do += [(node.left, to_left), (node.right, before - to_left)]
        return counts

    def rows_until(self, source: int, needed: np.ndarray) -> int | None:
        """Returns the rows after which every lane has had some number of slots of a source.

        Args:
            source: index of the source.
            needed: int64 [lanes], slots that each lane needs.

        Returns:
            The number of rows, at most MAX_ROWS; None if the source has no weight.
        """
        most = int(needed.max())
        if most <= 0:
            return 0
        if self.parts[source] == 0:
            return None
        # A lane has at most one sample less than its fraction for each level of the tree.
        enough = (most + len(PHASE_BASES)) * WEIGHT_PARTS // self.parts[source] + 1
        return bisect_left(
            range(min(enough, MAX_ROWS)),
            True,
            key=lambda row: bool((self.counts_by_lane(row)[:, source] >= needed).all()),
        )


@dataclass(frozen=True)
class SourceSplit:
    """Division of some slots of every lane between two groups of sources, as even as possible.

    With w = left_parts / all_parts, floor(k w + phase) of a lane's first k slots go to the left,
    a Beatty sequence. The phases of the lanes are 0, 1/L, ..., (L-1)/L in some order. At the root,
    where k is the same in all lanes, the L lanes thus give floor(L k w) slots to the left
    (Hermite's identity). Below it, lanes differ in k. Phases whose order has low discrepancy keep
    the sum close (Halton 1960, "On the efficiency of certain quasi-random sequences of points").
    """

    left_parts: int
    all_parts: int  # at most WEIGHT_PARTS
    phases: np.ndarray  # int64 [lanes], in units of 1 / all_parts
    left: SourceSplit | int  # another split, or the index of a source
    right: SourceSplit | int

    def num_left(self, lane_numbers: np.ndarray, num_slots: np.ndarray) -> np.ndarray:
        """Returns int64 [n], the slots that go to the left of a lane's first `num_slots`."""
        turns, rest = np.divmod(num_slots, self.all_parts)  # the products below fit into int64
        within = (rest * self.left_parts + self.phases[lane_numbers]) // self.all_parts
        return turns * self.left_parts + within


def integer_parts(weights: Sequence[float]) -> list[int]:
    """Rounds weights to integers with the sum WEIGHT_PARTS; the largest gets the rest."""
    total = sum(map(Fraction, weights))
    parts = [round(Fraction(weight) * WEIGHT_PARTS / total) for weight in weights]
    parts[weights.index(max(weights))] += WEIGHT_PARTS - sum(parts)
    return parts


def _refuse_vanishing(part: int, weight: str, owner: str) -> None:
    """Refuses a weight that the resolution of the weights rounds to 0."""
    if part == 0:
        raise InputError(
            f"{weight} is less than a {WEIGHT_PARTS:,}th of all weights; raise it, or remove "
            f"{owner}"
        )


def spread_ranks(num: int, *, base: int) -> np.ndarray:
    """Returns int64 [num], the ranks of 0, ..., num - 1 by their reversed digits in some base.

    Neighbouring numbers have ranks far apart, so that neighbouring lanes, which one rank carries,
    have different sources in a row.
    """
    numbers, reversed_digits, power = np.arange(num), np.zeros(num, dtype=np.int64), 1
    while power < num:
        numbers, digits = np.divmod(numbers, base)
        reversed_digits = reversed_digits * base + digits
        power *= base
    return np.argsort(np.argsort(reversed_digits))


class StreamChoice:
    """Choice of the streams that a step takes: all, or one, spread as evenly as weights allow.

    With one per step, let w be the first stream's fraction of all weight. It takes step t if
    floor((t + 1) w) > floor(t w), a Beatty sequence. The others divide the other steps likewise.

    Args:
        weights: weight of every stream.
        takes_all: whether every step takes all streams.

    Raises:
        InputError: if steps take one stream, and a weight is too small.
    """

    def __init__(self, weights: Mapping[Name, float], *, takes_all: bool) -> None:
        self.names = list(weights)
        self.takes_all = takes_all
        total = sum(weights.values())
        self._parts = [round(weight / total * WEIGHT_PARTS) for weight in weights.values()]
        if not takes_all:
            for name, part in zip(self.names, self._parts, strict=True):
                _refuse_vanishing(part, f"stream {name!r}: its weight", "the stream")

    def streams_of_step(self, step: int) -> list[Name]:
        """Returns the streams that a step takes; steps count from 0."""
        if self.takes_all:
            return self.names
        before, after = self.num_taken(step), self.num_taken(step + 1)
        return [name for name in self.names if after[name] > before[name]]

    def steps_until(self, name: Name, num_taken: int) -> int:
        """Returns the smallest number of first steps that take a stream `num_taken` times."""
        if self.takes_all:
            return num_taken
        part = self._parts[self.names.index(name)]
        enough = (num_taken + len(self.names)) * WEIGHT_PARTS * 2 // part + 1
        return bisect_left(range(enough), num_taken, key=lambda step: self.num_taken(step)[name])

    def num_taken(self, num_steps: int) -> dict[Name, int]:
        """Returns, for each stream, how many of the first `num_steps` steps take it."""
        if self.takes_all:
            return dict.fromkeys(self.names, num_steps)
        taken, steps_left, parts_left = {}, num_steps, sum(self._parts)
        for name, part in zip(self.names, self._parts, strict=True):
            taken[name] = steps_left * part // parts_left
            steps_left -= taken[name]
            parts_left -= part
        return taken
