"""Search for pairs of 64-bit hashes within a Hamming distance, without comparing all pairs.

Hashes are divided into bands, and a distance of r bits is divided among the bands. By the
pigeonhole principle, two hashes within the distance differ in some band by at most its allotted
number of bits. Therefore it suffices to flip all combinations of that many bits in each band, and
to look up hashes with an equal band:

    exact_bands        bands that miss no pair within a distance
    near_pairs         pairs that agree in a band and are within the distance

The implementation sorts and counts with numpy: a million hashes take seconds, in bounded memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

HASH_BITS = 64
NUM_BANDS = 3  # each has 21 or 22 bits; among a million hashes, bands are rarely equal by chance
PAIRS_AT_ONCE = 1 << 20  # limits memory use
QUERIES_AT_ONCE = 1 << 15  # small enough that their table entries fit in the CPU cache


@dataclass(frozen=True)
class Band:
    """A range of bits of a hash, and the number of bits in it that may differ."""

    first_bit: int
    num_bits: int
    max_flips: int

    def keys_of(self, hashes: np.ndarray) -> np.ndarray:
        """Extracts the band, int64 [n], of hashes uint64 [n]."""
        mask = np.uint64((1 << self.num_bits) - 1)
        return ((hashes >> np.uint64(self.first_bit)) & mask).astype(np.int64)

    def flips(self) -> Iterator[int]:
        """Yields every combination of at most `max_flips` bits of the band, as a mask for XOR."""
        for number in range(self.max_flips + 1):
            for bits in itertools.combinations(range(self.num_bits), number):
                yield sum(1 << bit for bit in bits)


def exact_bands(max_distance: int) -> list[Band]:
    """Builds bands such that any two hashes within the distance agree in at least one band.

    If the bands allow r_1, r_2, ... flips, a missed pair differs in at least
    (r_1 + 1) + (r_2 + 1) + ... bits; this sum must be max_distance + 1.
    """
    edges = [HASH_BITS * number // NUM_BANDS for number in range(NUM_BANDS + 1)]
    total = max_distance + 1 - NUM_BANDS
    flips = [(total + number) // NUM_BANDS for number in range(NUM_BANDS)]
    return [
        Band(first, end - first, max_flips)
        for first, end, max_flips in zip(edges[:-1], edges[1:], flips, strict=True)
        if max_flips >= 0
    ]


def near_pairs(
    queries: np.ndarray, hashes: np.ndarray, *, max_distance: int, bands: Sequence[Band]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Finds all pairs of a query and a hash that agree in a band and are within a distance.

    Args:
        queries: uint64 [n].
        hashes: uint64 [m].
        max_distance: number of bits that may differ.
        bands: bands to search; exact_bands(max_distance) misses no pair.

    Yields:
        (int64 [pairs] indices of queries, int64 [pairs] indices of hashes), in chunks of bounded
        size and reproducible order. Each pair occurs once.
    """
    for number, band in enumerate(bands):
        query_order = np.argsort(band.keys_of(queries), kind="stable")
        hash_order = np.argsort(band.keys_of(hashes), kind="stable")
        sorted_queries, sorted_hashes = queries[query_order], hashes[hash_order]
        for left, right in _pairs_of_band(sorted_queries, sorted_hashes, band):
            different = sorted_queries[left] ^ sorted_hashes[right]
            near = np.flatnonzero(np.bitwise_count(different) <= max_distance)
            for earlier in bands[:number]:  # pairs that agree in these bands were yielded before
                flips = np.bitwise_count(earlier.keys_of(different[near]))
                near = near[flips > earlier.max_flips]
            if len(near):
                yield query_order[left[near]], hash_order[right[near]]


def _pairs_of_band(
    queries: np.ndarray, hashes: np.ndarray, band: Band
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields every pair whose bands differ in at most `max_flips` bits, once.

    Both arrays are sorted by the band, so that table accesses are local.
    """
    starts = np.zeros((1 << band.num_bits) + 1, np.int32)
    counts = np.bincount(band.keys_of(hashes), minlength=1 << band.num_bits)
    np.cumsum(counts, out=starts[1:])
    query_keys = band.keys_of(queries)
    for first in range(0, len(queries), QUERIES_AT_ONCE):
        keys = query_keys[first : first + QUERIES_AT_ONCE]
        for flip in band.flips():
            flipped = keys ^ flip
            begins = starts[flipped]
            numbers = starts[flipped + 1] - begins
            hits = np.flatnonzero(numbers)
            if len(hits):
                yield from _expanded(hits + first, begins[hits], numbers[hits])


def _expanded(
    queries: np.ndarray, begins: np.ndarray, numbers: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (query, begin), (query, begin + 1), ... for each query, in chunks of bounded size."""
    ends = np.cumsum(numbers, dtype=np.int64)
    total = int(ends[-1])
    if total <= PAIRS_AT_ONCE:
        yield np.repeat(queries, numbers), _ranges(begins, numbers, ends - numbers, total)
        return
    for first in range(0, total, PAIRS_AT_ONCE):
        last = min(first + PAIRS_AT_ONCE, total)
        low, high = np.searchsorted(ends, [first, last - 1], side="right")
        part = slice(low, high + 1)
        # already yielded in the previous chunk
        before = np.maximum(first - (ends[part] - numbers[part]), 0)
        left = np.minimum(ends[part], last) - (ends[part] - numbers[part]) - before
        indices = _ranges(begins[part] + before, left, np.cumsum(left) - left, last - first)
        yield np.repeat(queries[part], left), indices


def _ranges(begins: np.ndarray, numbers: np.ndarray, before: np.ndarray, total: int) -> np.ndarray:
    """Returns begin, begin + 1, ... for each begin; `before` are cumulative sums of `numbers`."""
    return np.repeat(begins - before, numbers) + np.arange(total)
