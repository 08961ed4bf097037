"""Pairs of pictures that are the same but for size, compression, mirroring, colour or a small crop.

1. classes      pictures of one hash and nearly one thumbnail: only the first is compared on
2. candidates   hashes within a distance: of whole pictures, and of a picture with the windows
                of another (data_prep.dedup.crop_windows), each in both orientations
3. confirmed    by the thumbnails, roughly at once and then, once each, with the crop found

A window is looked for by the low frequencies of the hash, which crops hardly change: one bit of
LOW_BITS may differ. Whole pictures are found exactly within the distance.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from data_prep.dedup.crop_windows import NUM_WINDOWS, window_hashes
from data_prep.dedup.hamming import Band, exact_bands, near_pairs
from data_prep.dedup.image_similarity import image_similarity, plain_similarity, rough_similarity

LOW_BITS = Band(first_bit=0, num_bits=20, max_flips=1)
WINDOW_DISTANCE = 4  # bits more than between whole pictures: a crop lies between the windows
MIN_ROUGH_SIMILARITY = 0.8
COARSE_STEP = 16  # levels of 255, of a thumbnail that is nearly another
PAIRS_AT_ONCE = 1 << 14
CANDIDATES_AT_ONCE = 1 << 23  # before all but the best of each pair are forgotten


@dataclass(frozen=True)
class ImageHashes:
    """The fingerprints of pictures; those that are no reference come first."""

    phash: np.ndarray  # uint64 [n]
    phash_mirrored: np.ndarray  # uint64 [n]
    signatures: np.ndarray  # uint8 [n, SIGNATURE_BYTES]

    def __getitem__(self, chosen: np.ndarray) -> ImageHashes:
        return ImageHashes(self.phash[chosen], self.phash_mirrored[chosen], self.signatures[chosen])


@dataclass(frozen=True)
class Matches:
    """Pairs of pictures that are alike; and members of classes, each with the first of its class.

    Members are in no pair.
    """

    left: np.ndarray  # int64 [pairs]
    right: np.ndarray  # int64 [pairs]
    similarity: np.ndarray  # float32 [pairs]
    members: np.ndarray  # int64 [members]
    member_firsts: np.ndarray  # int64 [members]
    member_similarity: np.ndarray  # float32 [members]


@dataclass(frozen=True)
class _Candidates:
    """Pairs of a picture and the window of another that it may show."""

    crops: np.ndarray  # int64 [pairs]
    wholes: np.ndarray  # int64 [pairs]
    is_mirrored: np.ndarray  # bool [pairs]
    windows: np.ndarray  # int64 [pairs]
    rough: np.ndarray  # float32 [pairs]

    def best(self) -> _Candidates:
        """The best of each pair, whichever of the two is the crop; of equals, the first here."""
        low, high = np.minimum(self.crops, self.wholes), np.maximum(self.crops, self.wholes)
        order = np.lexsort((-self.rough, (low << 32) | high))
        is_first = np.ones(len(order), bool)
        is_first[1:] = (np.diff(low[order]) != 0) | (np.diff(high[order]) != 0)
        return self[order[is_first]]

    def __getitem__(self, chosen: np.ndarray) -> _Candidates:
        return _Candidates(*(values[chosen] for values in vars(self).values()))


def near_images(
    hashes: ImageHashes,
    *,
    is_reference: np.ndarray,
    max_distance: int,
    min_similarity: float,
    workers: int,
) -> Matches:
    """The pairs of pictures that are alike.

    Args:
        hashes: of n pictures.
        is_reference: bool [n]: pictures that are not compared with one another.
        max_distance: bits in which the hashes of whole pictures may differ.
        min_similarity: of image_similarity.
        workers: threads; they do not change the result.
    """
    firsts = _first_of_class(hashes, min_similarity)
    chosen = np.flatnonzero(firsts == np.arange(len(firsts)))
    candidates = _candidates(hashes[chosen], is_reference[chosen], max_distance, workers)
    similarity = _confirmed(hashes[chosen], candidates, min_similarity, workers)
    is_match = similarity >= min_similarity
    members = np.flatnonzero((firsts != np.arange(len(firsts))) & ~is_reference[firsts])
    return Matches(
        left=chosen[candidates.crops[is_match]],
        right=chosen[candidates.wholes[is_match]],
        similarity=similarity[is_match],
        members=members,
        member_firsts=firsts[members],
        member_similarity=_plain(hashes, members, firsts[members]),
    )


# ------------------------------------------------------------------------------------- classes


def _first_of_class(hashes: ImageHashes, min_similarity: float) -> np.ndarray:
    """int64 [n]: the first picture of each one's class, which may be itself.

    200,000 blank pictures are one class, instead of 20,000,000,000 pairs.
    """
    keys = np.empty(len(hashes.phash), np.uint64)
    for first in range(0, len(keys), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        keys[part] = _row_keys(hashes.signatures[part] // COARSE_STEP) ^ hashes.phash[part]
    firsts = _first_of_equals(keys)
    members = np.flatnonzero(firsts != np.arange(len(firsts)))
    is_equal_hash = hashes.phash[members] == hashes.phash[firsts[members]]
    is_same = is_equal_hash & (_plain(hashes, members, firsts[members]) >= min_similarity)
    firsts[members[~is_same]] = members[~is_same]
    return firsts


def _first_of_equals(keys: np.ndarray) -> np.ndarray:
    """int64 [n]: the first place at which each of [n] keys stands."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    firsts = np.empty(len(keys), np.int64)
    firsts[order] = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    return firsts


def _row_keys(rows: np.ndarray) -> np.ndarray:
    """uint64 [n]: the same for equal rows of uint8 [n, bytes], and hardly ever for others."""
    words = np.ascontiguousarray(rows).view(np.uint64)
    odd = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    mixed = words ^ (words >> np.uint64(29))
    return (mixed * odd).sum(axis=1, dtype=np.uint64)


def _plain(hashes: ImageHashes, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float32 [pairs]"""
    parts = [np.empty(0, np.float32)]
    for first in range(0, len(left), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        signatures = hashes.signatures
        pairs = signatures[left[part]], signatures[right[part]]
        parts.append(plain_similarity(*pairs, is_mirrored=np.zeros(len(pairs[0]), bool)))
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------- candidates


def _candidates(
    hashes: ImageHashes, is_reference: np.ndarray, max_distance: int, workers: int
) -> _Candidates:
    """The pairs that are roughly alike, each once, with the best window found."""
    queries = np.concatenate([hashes.phash, hashes.phash_mirrored])
    order = np.argsort(LOW_BITS.keys_of(queries), kind="stable")
    queries = queries[order]  # sorted once instead of in each of the searches
    searches = [(0, max_distance, [band]) for band in exact_bands(max_distance)]
    searches += [
        (window, max_distance + WINDOW_DISTANCE, [LOW_BITS]) for window in range(NUM_WINDOWS)
    ]

    def search(arguments: tuple[int, int, list[Band]]) -> _Candidates:
        window, distance, bands = arguments
        is_whole = bands != [LOW_BITS]
        table = hashes.phash if is_whole else window_hashes(hashes.signatures, window)
        every = [_NO_CANDIDATES]
        for left, right in near_pairs(queries, table, max_distance=distance, bands=bands):
            is_mirrored, crops = np.divmod(order[left], len(table))
            is_new = (crops < right) if is_whole else (crops != right)
            is_new &= ~(is_reference[crops] & is_reference[right])
            pairs = (crops[is_new], right[is_new], is_mirrored[is_new] == 1)
            every += list(_roughly_alike(hashes.signatures, *pairs, window=window))
        return _joined(every).best()

    every = [_NO_CANDIDATES]
    with ThreadPoolExecutor(workers) as executor:
        for found in executor.map(search, searches):
            every.append(found)
            if sum(len(part.crops) for part in every[1:]) > CANDIDATES_AT_ONCE:
                every = [_joined(every).best()]
    return _joined(every).best()


_NO_CANDIDATES = _Candidates(
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, bool),
    np.empty(0, np.int64),
    np.empty(0, np.float32),
)


def _joined(every: list[_Candidates]) -> _Candidates:
    columns = zip(*(vars(candidates).values() for candidates in every), strict=True)
    return _Candidates(*(np.concatenate(parts) for parts in columns))


def _roughly_alike(
    signatures: np.ndarray,
    crops: np.ndarray,
    wholes: np.ndarray,
    is_mirrored: np.ndarray,
    *,
    window: int,
) -> Iterator[_Candidates]:
    for first in range(0, len(crops), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        rough = rough_similarity(
            signatures[crops[part]],
            signatures[wholes[part]],
            is_mirrored=is_mirrored[part],
            window=window,
        )
        windows = np.full(len(rough), window)
        candidates = _Candidates(crops[part], wholes[part], is_mirrored[part], windows, rough)
        yield candidates[rough >= MIN_ROUGH_SIMILARITY]


def _confirmed(
    hashes: ImageHashes, candidates: _Candidates, min_similarity: float, workers: int
) -> np.ndarray:
    """float32 [pairs]: how alike they are, whichever of the two is the crop."""
    signatures = hashes.signatures

    def similarity_of(part: slice) -> np.ndarray:
        crops, wholes = signatures[candidates.crops[part]], signatures[candidates.wholes[part]]
        is_mirrored, windows = candidates.is_mirrored[part], candidates.windows[part]
        similarity = plain_similarity(crops, wholes, is_mirrored=is_mirrored)
        # Most are no crops; and of those that are, the rough window tells which of the two is.
        for parts, whole, first in ((crops, wholes, windows), (wholes, crops, 0 * windows)):
            rest = np.flatnonzero(similarity < min_similarity)
            aligned = image_similarity(
                parts[rest], whole[rest], is_mirrored=is_mirrored[rest], windows=first[rest]
            )
            similarity[rest] = np.maximum(similarity[rest], aligned)
        return similarity

    starts = range(0, len(candidates.crops), PAIRS_AT_ONCE)
    parts = [slice(start, start + PAIRS_AT_ONCE) for start in starts]
    with ThreadPoolExecutor(workers) as executor:
        return np.concatenate([np.empty(0, np.float32), *executor.map(similarity_of, parts)])
