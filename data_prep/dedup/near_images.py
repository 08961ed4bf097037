"""Search for images that differ only in size, compression, mirroring, color or a small crop.

1. classes      images with equal hashes and almost equal thumbnails; only the first is searched
2. candidates   pairs with hashes within a distance: two whole images, or an image and a window of
                another image (data_prep.dedup.crop_windows), in both orientations unless mirrored
                images are to be kept
3. confirmed    candidates with similar thumbnails, compared first roughly and then with exact crops

Windows are searched by the low-frequency bits of the hash, which crops hardly change: one bit of
LOW_BITS may differ. For whole images, the search finds every pair within the distance.
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
WINDOW_DISTANCE = 4  # additional bits, because an exact crop lies between two windows
MIN_ROUGH_SIMILARITY = 0.8
COARSE_STEP = 16  # quantisation step (levels of 255) for grouping almost equal thumbnails
PAIRS_AT_ONCE = 1 << 14
CANDIDATES_AT_ONCE = 1 << 23  # limit before candidates are reduced to the best of each pair


@dataclass(frozen=True)
class ImageHashes:
    """The fingerprints of images; references come last."""

    phash: np.ndarray  # uint64 [n]
    phash_mirrored: np.ndarray  # uint64 [n]
    signatures: np.ndarray  # uint8 [n, SIGNATURE_BYTES]

    def __getitem__(self, chosen: np.ndarray) -> ImageHashes:
        return ImageHashes(self.phash[chosen], self.phash_mirrored[chosen], self.signatures[chosen])


@dataclass(frozen=True)
class Matches:
    """Pairs of similar images, and class members with the first image of their class.

    Members do not occur in pairs.
    """

    left: np.ndarray  # int64 [pairs]
    right: np.ndarray  # int64 [pairs]
    similarity: np.ndarray  # float32 [pairs]
    members: np.ndarray  # int64 [members]
    member_firsts: np.ndarray  # int64 [members]
    member_similarity: np.ndarray  # float32 [members]


@dataclass(frozen=True)
class _Candidates:
    """Pairs of an image and the window of another image that it may show."""

    crops: np.ndarray  # int64 [pairs]
    wholes: np.ndarray  # int64 [pairs]
    is_mirrored: np.ndarray  # bool [pairs]
    windows: np.ndarray  # int64 [pairs]
    rough: np.ndarray  # float32 [pairs]

    def best(self) -> _Candidates:
        """Keeps the best candidate of each pair, in either direction; ties keep the first."""
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
    matches_mirrored: bool = True,
) -> Matches:
    """Finds the pairs of similar images.

    Args:
        hashes: fingerprints of n images.
        is_reference: bool [n]; references are not compared with each other.
        max_distance: number of bits in which the hashes of whole images may differ.
        min_similarity: threshold of `image_similarity`.
        workers: number of threads; has no effect on the result.
        matches_mirrored: whether mirrored images are similar.
    """
    firsts = _first_of_class(hashes, min_similarity)
    chosen = np.flatnonzero(firsts == np.arange(len(firsts)))
    candidates = _candidates(
        hashes[chosen],
        is_reference[chosen],
        max_distance=max_distance,
        workers=workers,
        matches_mirrored=matches_mirrored,
    )
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
    """Returns the first image of each image's class, int64 [n], which may be the image itself.

    For example, 200,000 blank images are one class instead of 20,000,000,000 pairs.
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
    """Returns the first index of each of [n] keys, int64 [n]."""
    order = np.argsort(keys, kind="stable")
    is_first = np.ones(len(keys), bool)
    is_first[1:] = keys[order][1:] != keys[order][:-1]
    firsts = np.empty(len(keys), np.int64)
    firsts[order] = order[np.flatnonzero(is_first)[np.cumsum(is_first) - 1]]
    return firsts


def _row_keys(rows: np.ndarray) -> np.ndarray:
    """Hashes rows of uint8 [n, bytes] to uint64 [n]."""
    words = np.ascontiguousarray(rows).view(np.uint64)
    odd = np.random.default_rng(0).integers(2**63, size=words.shape[1], dtype=np.uint64) * 2 + 1
    mixed = words ^ (words >> np.uint64(29))
    return (mixed * odd).sum(axis=1, dtype=np.uint64)


def _plain(hashes: ImageHashes, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the similarity without crops, float32 [pairs]."""
    parts = [np.empty(0, np.float32)]
    for first in range(0, len(left), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        signatures = hashes.signatures
        pairs = signatures[left[part]], signatures[right[part]]
        parts.append(plain_similarity(*pairs, is_mirrored=np.zeros(len(pairs[0]), bool)))
    return np.concatenate(parts)


# ---------------------------------------------------------------------------------- candidates


def _candidates(
    hashes: ImageHashes,
    is_reference: np.ndarray,
    *,
    max_distance: int,
    workers: int,
    matches_mirrored: bool,
) -> _Candidates:
    """Finds roughly similar pairs, each once, with their best window."""
    orientations = [hashes.phash, hashes.phash_mirrored][: 1 + matches_mirrored]
    queries = np.concatenate(orientations)
    order = np.argsort(LOW_BITS.keys_of(queries), kind="stable")
    queries = queries[order]  # sorted once instead of in every search
    searches = [(0, max_distance, [band]) for band in exact_bands(max_distance)]
    searches += [
        (window, max_distance + WINDOW_DISTANCE, [LOW_BITS]) for window in range(NUM_WINDOWS)
    ]

    def search(arguments: tuple[int, int, list[Band]]) -> _Candidates:
        window, distance, bands = arguments
        is_whole = bands != [LOW_BITS]
        table = hashes.phash if is_whole else window_hashes(hashes.signatures, window)
        every = [_NO_]
        for left, right in near_pairs(queries, table, max_distance=distance, bands=bands):
            is_mirrored, crops = np.divmod(order[left], len(table))
            is_new = (crops < right) if is_whole else (crops != right)
            is_new &= ~(is_reference[crops] & is_reference[right])
            pairs = (crops[is_new], right[is_new], is_mirrored[is_new] == 1)
            every += list(_roughly_similar(hashes.signatures, *pairs, window=window))
        return _joined(every).best()

    every = [_NO_]
    with ThreadPoolExecutor(workers) as executor:
        for found in executor.map(search, searches):
            every.append(found)
            if sum(len(part.crops) for part in every[1:]) > CANDIDATES_AT_ONCE:
                every = [_joined(every).best()]
    return _joined(every).best()


_NO_ = _Candidates(
    np.empty(0, np.int64),
    np.empty(0, np.int64),
    np.empty(0, bool),
    np.empty(0, np.int64),
    np.empty(0, np.float32),
)


def _joined(every: list[_Candidates]) -> _Candidates:
    columns = zip(*(vars(candidates).values() for candidates in every), strict=True)
    return _Candidates(*(np.concatenate(parts) for parts in columns))


def _roughly_similar(
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
    """Returns the similarity of candidates, in either direction, float32 [pairs]."""
    signatures = hashes.signatures

    def similarity_of(part: slice) -> np.ndarray:
        crops, wholes = signatures[candidates.crops[part]], signatures[candidates.wholes[part]]
        is_mirrored, windows = candidates.is_mirrored[part], candidates.windows[part]
        similarity = plain_similarity(crops, wholes, is_mirrored=is_mirrored)
        # Most pairs are not crops. Otherwise, either image may be the crop, but only one has a
        # known window.
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
