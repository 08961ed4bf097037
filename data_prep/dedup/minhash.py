"""Search for near-duplicate captions, without comparing all pairs.

1. The shingles of each caption form a set (data_prep.dedup.shingles).
2. Captions with equal sets are merged.
3. MinHash (Broder 1997): for each of many hash functions, the smallest hash in a set is computed.
   For two sets, it is equal with a probability of their Jaccard similarity.
4. Several MinHashes form a band. Captions that share a band are candidates.
5. The exact Jaccard similarity of each candidate pair is compared with the threshold.

Shingles and MinHashes are stored in files, so that memory does not grow with caption length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.dedup.shingles import mix_bits, shingles_of

SEED = 1997  # seed of the hash functions
MIN_RECALL = 0.99  # expected fraction of pairs at the similarity threshold that become candidates
NEIGHBOURS = 16  # number of successors with an equal band that a caption is compared with
FUNCTIONS_AT_ONCE = 32  # limits memory use, like the next two constants
CAPTIONS_AT_ONCE = 4096
PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class ShingleSets:
    """The shingle sets of many captions, concatenated."""

    values: np.ndarray  # uint64 [all shingles], sorted within a caption
    starts: np.ndarray  # int64 [captions + 1]
    min_hashes: np.ndarray  # uint32 [captions, permutations]; 0 for empty sets


def near_caption_pairs(
    sets: ShingleSets, *, min_jaccard: float, num_queries: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds pairs of captions with similar shingle sets.

    For a large group of similar captions, only enough pairs to connect the group are found.

    Args:
        sets: shingle sets of all captions; captions without words match nothing.
        min_jaccard: minimum Jaccard similarity, |intersection| / |union|.
        num_queries: pairs of two captions with indices from this number on are excluded; None:
            no exclusions.

    Returns:
        first int64 [m], second int64 [m], similarity float32 [m]; sorted, with first < second.
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
    joined, indices = np.unique(joined, axis=0, return_index=True)
    has_query = joined[:, 0] < last_query
    return (*joined[has_query].T, np.concatenate(similarities)[indices][has_query])


def read_shingles(
    batches: Iterable[Sequence[str]], folder: Path, *, shingle_words: int, permutations: int
) -> ShingleSets:
    """Computes the shingles and MinHashes of captions, and stores them in files.

    Args:
        batches: batches of captions.
        folder: folder for temporary files, which back the result.
        shingle_words: number of words per shingle.
        permutations: number of hash functions.
    """
    counts = [np.zeros(1, np.int64)]
    values_path, hashes_path = folder / "shingles.bin", folder / "min_hashes.bin"
    with values_path.open("wb") as values_file, hashes_path.open("wb") as hashes_file:
        for batch in _chunks(batches):
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


def _chunks(batches: Iterable[Sequence[str]]) -> Iterator[Sequence[str]]:
    for batch in batches:
        for start in range(0, len(batch), CAPTIONS_AT_ONCE):
            yield batch[start : start + CAPTIONS_AT_ONCE]


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", shape=shape)


def min_hashes(values: np.ndarray, counts: np.ndarray, *, permutations: int) -> np.ndarray:
    """Computes the MinHashes of sets.

    Args:
        values: uint64 [all], the concatenated sets.
        counts: int64 [n], sizes of the sets.
        permutations: number of hash functions.

    Returns:
        uint32 [n, permutations]; 0 for empty sets.
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
    """Returns odd factors and terms of x -> factor * x + term (mod 2**64); uses bits 32 to 63."""
    rng = np.random.Generator(np.random.PCG64(SEED))
    factors, terms = rng.integers(0, 2**64, (2, permutations), dtype=np.uint64)
    return factors | np.uint64(1), terms


def bands_for(min_jaccard: float, *, permutations: int) -> tuple[int, int]:
    """Chooses (number of bands, MinHashes per band).

    These are the longest bands for which two sets at the similarity threshold share at least one
    band with probability MIN_RECALL.
    """
    for num_rows in range(permutations, 1, -1):
        num_bands = permutations // num_rows
        if 1 - (1 - min_jaccard**num_rows) ** num_bands >= MIN_RECALL:
            return num_bands, num_rows
    return permutations, 1


def jaccard_of_pairs(sets: ShingleSets, pairs: np.ndarray) -> np.ndarray:
    """Computes the Jaccard similarity, float64 [m], of pairs int64 [m, 2] of nonempty sets."""
    parts = [np.empty(0)]
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
        parts.append(shared / (sizes.sum(axis=1) - shared))
    return np.concatenate(parts)


def _equal_sets(sets: ShingleSets) -> tuple[np.ndarray, np.ndarray]:
    """Returns (first caption of each distinct set, pairs of it with the other captions)."""
    starts, values = sets.starts, sets.values
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mix_bits(np.asarray(values)))])
    keys = mix_bits(sums[starts[1:]] - sums[starts[:-1]])  # one per set; independent of order
    has_words = np.flatnonzero(np.diff(starts))
    _, first, number = np.unique(keys[has_words], return_index=True, return_inverse=True)
    first_of = has_words[first[number]]
    is_first = first_of == has_words
    return has_words[is_first], np.stack([first_of[~is_first], has_words[~is_first]], axis=1)


def _band_keys(min_hashes: np.ndarray) -> np.ndarray:
    """Hashes rows to uint64 [n]; equal rows have equal hashes."""
    keys = np.zeros(len(min_hashes), np.uint64)
    for column in range(min_hashes.shape[1]):
        keys = mix_bits(keys + min_hashes[:, column].astype(np.uint64))
    return keys


def _sharing_pairs(
    keys: np.ndarray, captions: np.ndarray, *, last_query: int
) -> Iterator[np.ndarray]:
    """Yields pairs int64 [m, 2] of captions that are neighbours among captions with equal keys."""
    order = np.argsort(keys, kind="stable")
    keys, captions = keys[order], captions[order]
    left = np.flatnonzero(captions < last_query)
    for distance in range(1, NEIGHBOURS + 1):
        left = left[left < len(keys) - distance]
        left = left[keys[left] == keys[left + distance]]
        for start in range(0, len(left), PAIRS_AT_ONCE):
            part = left[start : start + PAIRS_AT_ONCE]
            yield np.stack([captions[part], captions[part + distance]], axis=1)
