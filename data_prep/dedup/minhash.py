"""Near-duplicate captions among many, without comparing each with each.

1. the shingles of each caption                                   data_prep.dedup.shingles
2. captions of equal sets are one from here on
3. MinHash: for each of many hash functions, the smallest hash of a set; two sets share it with a
   probability that equals their Jaccard similarity (Broder 1997)
4. bands of several of these numbers; captions that share a band are candidates
5. the exact Jaccard similarity of the candidates decides

Shingles and MinHashes are kept in files, so that memory does not grow with the length of captions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.dedup.shingles import mixed, shingles_of

SEED = 1997  # of the hash functions
MIN_RECALL = 0.99  # of candidates, at the least similarity that counts
NEIGHBOURS = 16  # captions after a caption, of those that share a band, which it is compared with
FUNCTIONS_AT_ONCE = 32  # bounds the memory, as do the next two
CAPTIONS_AT_ONCE = 4096
PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ShingleSets:
    """The sets of many captions, laid end to end."""

    values: np.ndarray  # uint64 [all shingles], sorted within a caption
    starts: np.ndarray  # int64 [captions + 1]
    min_hashes: np.ndarray  # uint32 [captions, permutations]; 0 where a set is empty


def near_caption_pairs(
    sets: ShingleSets, *, min_jaccard: float, num_queries: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs of captions whose sets of shingles are alike.

    Of many captions that are all alike not all pairs are found, but pairs that connect them.

    Args:
        sets: of all captions; those without words match nothing.
        min_jaccard: least share of the shingles of either that are in both.
        num_queries: pairs among the captions from this one on are left out; None: none is.

    Returns:
        first int64 [m], second int64 [m], similarity float32 [m]: first < second, ordered.
    """
    last_query = len(sets.starts) - 1 if num_queries is None else num_queries
    is_distinct, pairs = _equal_sets(sets)
    similarities = [np.ones(len(pairs), np.float32)]
    pairs = [pairs]
    num_bands, num_rows = bands_for(min_jaccard, permutations=sets.min_hashes.shape[1])
    for band in range(num_bands):
        columns = slice(band * num_rows, (band + 1) * num_rows)
        keys = _band_keys(sets.min_hashes[:, columns])[is_distinct]
        for candidates in _sharing_pairs(keys, is_distinct, last_query=last_query):
            similarity = jaccard_of_pairs(sets, candidates)
            is_near = similarity >= min_jaccard
            pairs.append(candidates[is_near])
            similarities.append(similarity[is_near].astype(np.float32))
    joined = np.concatenate(pairs)
    joined, places = np.unique(joined, axis=0, return_index=True)
    is_asked = joined[:, 0] < last_query
    return (*joined[is_asked].T, np.concatenate(similarities)[places][is_asked])


def read_shingles(
    batches: Iterable[Sequence[str]], folder: Path, *, shingle_words: int, permutations: int
) -> ShingleSets:
    """The shingles and MinHashes of captions, kept in files of a folder.

    Args:
        batches: of captions.
        folder: for temporary files; the result reads them.
        shingle_words: words in a shingle.
        permutations: number of hash functions.
    """
    counts = [np.zeros(1, np.int64)]
    values_path, hashes_path = folder / "shingles.bin", folder / "min_hashes.bin"
    with values_path.open("wb") as values_file, hashes_path.open("wb") as hashes_file:
        for batch in _pieces(batches):
            values, count = shingles_of(batch, shingle_words=shingle_words)
            values.tofile(values_file)
            min_hashes(values, count, permutations=permutations).tofile(hashes_file)
            counts.append(count)
    starts = np.cumsum(np.concatenate(counts))
    shape = (len(starts) - 1, permutations)
    return ShingleSets(
        values=_mapped(values_path, np.uint64, (int(starts[-1]),)),
        starts=starts,
        min_hashes=_mapped(hashes_path, np.uint32, shape),
    )


def _pieces(batches: Iterable[Sequence[str]]) -> Iterator[Sequence[str]]:
    for batch in batches:
        for start in range(0, len(batch), CAPTIONS_AT_ONCE):
            yield batch[start : start + CAPTIONS_AT_ONCE]


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", shape=shape)


def min_hashes(values: np.ndarray, counts: np.ndarray, *, permutations: int) -> np.ndarray:
    """The MinHashes of sets.

    Args:
        values: uint64 [all], of the sets end to end.
        counts: int64 [n], how many are each set's.
        permutations: number of hash functions.

    Returns:
        uint32 [n, permutations]; 0 where a set is empty.
    """
    factors, terms = _hash_functions(permutations)
    result = np.zeros((len(counts), permutations), np.uint32)
    starts = (np.cumsum(counts) - counts)[counts > 0]
    if not len(starts):
        return result
    for first in range(0, permutations, FUNCTIONS_AT_ONCE):
        part = slice(first, first + FUNCTIONS_AT_ONCE)
        hashes = factors[part, None] * values + terms[part, None]  # [functions, all]
        smallest = np.minimum.reduceat((hashes >> np.uint64(32)).astype(np.uint32), starts, axis=1)
        result[counts > 0, part] = smallest.T
    return result


def _hash_functions(permutations: int) -> tuple[np.ndarray, np.ndarray]:
    """Odd factors and terms of x -> factor * x + term modulo 2**64, whose upper half serves."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    factors, terms = rng.integers(0, 2**64, (2, permutations), dtype=np.uint64)
    return factors | np.uint64(1), terms


def bands_for(min_jaccard: float, *, permutations: int) -> tuple[int, int]:
    """(number of bands, MinHashes in each): the longest bands that two sets of the least similarity
    share at least one of with probability MIN_RECALL."""
    for num_rows in range(permutations, 1, -1):
        num_bands = permutations // num_rows
        if 1 - (1 - min_jaccard**num_rows) ** num_bands >= MIN_RECALL:
            return num_bands, num_rows
    return permutations, 1


def jaccard_of_pairs(sets: ShingleSets, pairs: np.ndarray) -> np.ndarray:
    """Exact Jaccard similarity, float64 [m], of pairs int64 [m, 2] of captions that have words."""
    pieces = [np.empty(0)]
    for start in range(0, len(pairs), PAIRS_AT_ONCE):
        part = pairs[start : start + PAIRS_AT_ONCE]
        sizes = sets.starts[part + 1] - sets.starts[part]  # [m, 2]
        pair_of = np.repeat(np.arange(len(part)), sizes.sum(axis=1))
        lengths = sizes.ravel()
        begins = np.repeat(sets.starts[part].ravel() - (np.cumsum(lengths) - lengths), lengths)
        values = sets.values[begins + np.arange(len(begins))]
        order = np.lexsort((values, pair_of))
        values, pair_of = values[order], pair_of[order]
        is_shared = (values[1:] == values[:-1]) & (pair_of[1:] == pair_of[:-1])
        shared = np.bincount(pair_of[1:][is_shared], minlength=len(part))
        pieces.append(shared / (sizes.sum(axis=1) - shared))
    return np.concatenate(pieces)


def _equal_sets(sets: ShingleSets) -> tuple[np.ndarray, np.ndarray]:
    """(places of the first caption of each distinct set, pairs of a caption and its set's first)"""
    starts, values = sets.starts, sets.values
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed(np.asarray(values)))])
    keys = mixed(sums[starts[1:]] - sums[starts[:-1]])  # of a set, whatever its order
    has_words = np.flatnonzero(np.diff(starts))
    _, first, number = np.unique(keys[has_words], return_index=True, return_inverse=True)
    first_of = has_words[first[number]]
    is_first = first_of == has_words
    return has_words[is_first], np.stack([first_of[~is_first], has_words[~is_first]], axis=1)


def _band_keys(min_hashes: np.ndarray) -> np.ndarray:
    """uint64 [n]: equal where all columns are equal."""
    keys = np.zeros(len(min_hashes), np.uint64)
    for column in range(min_hashes.shape[1]):
        keys = mixed(keys + min_hashes[:, column].astype(np.uint64))
    return keys


def _sharing_pairs(
    keys: np.ndarray, captions: np.ndarray, *, last_query: int
) -> Iterator[np.ndarray]:
    """Pairs of captions, int64 [m, 2], that have the same key and are close neighbours in order."""
    order = np.argsort(keys, kind="stable")
    keys, captions = keys[order], captions[order]
    left = np.flatnonzero(captions < last_query)
    for distance in range(1, NEIGHBOURS + 1):
        left = left[left < len(keys) - distance]
        left = left[keys[left] == keys[left + distance]]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            part = left[start : start + PAIRS_AT_ONCE]
            yield np.stack([captions[part], captions[part + distance]], axis=1)
