"""Search for near-duplicate audio clips, without comparing all pairs.

1. Keys are parts of a clip's fingerprint words. Each clip keeps a limited number of keys with the
   smallest hashes (bottom-k sketches, Broder 1997), so that copies of a clip share keys.
2. Clips that share a key are candidates, in the alignment of the shared key.
3. Candidates with too little agreement in the words around the key are dropped.
4. The remaining candidates are compared in full (`similarity_at`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.media.audio_fingerprint import NUM_BITS, WORD_SECONDS

KEYS_PER_CLIP = 128  # per table
LEAST_KEY_BITS, MAX_KEY_BITS = 20, 24
NUM_TABLES = 3  # each takes its keys from different bits of the words
NEIGHBOURS = 16  # number of successors with an equal key that a clip is compared with
WORDS_AROUND = 12  # number of words on each side of a shared key that are compared first
WORD_STEP = 3  # only every third word is compared, because adjacent words are similar
MIN_AGREEMENT_AROUND = 0.6
BYTES_PER_KEY = 64  # memory use while keys are sorted and compared
CLIPS_AT_ONCE = 2048
CANDIDATES_AT_ONCE = 1 << 18
HASH_FACTOR = np.uint32(0x9E3779B1)  # Knuth's multiplicative hash
MIN_OVERLAP = 0.8  # fraction of the longer clip; a short excerpt is not a duplicate
SHORT_CLIP_MARGIN = 0.055  # added to the required similarity for one second of audio


@dataclass(frozen=True)
class ClipWords:
    """The fingerprint words of many clips, concatenated."""

    words: np.ndarray  # uint32 [all words]; may be a file on disk (numpy.memmap)
    starts: np.ndarray  # int64 [clips + 1]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def of(self, clip: int) -> np.ndarray:
        """Returns the words of one clip, uint32 [words]."""
        return self.words[self.starts[clip] : self.starts[clip + 1]]


@dataclass(frozen=True)
class Keys:
    """Keys of many clips, sorted by value and then by index."""

    values: np.ndarray  # uint32 [k]
    indices: np.ndarray  # int64 [k]: index of the word among all words
    clips: np.ndarray  # int64 [k]
    in_clip: np.ndarray  # int64 [k]: index of the word in its clip
    lengths: np.ndarray  # int64 [k]: number of words of the clip


def near_audio_pairs(
    clips: ClipWords,
    *,
    min_similarity: float,
    num_queries: int | None = None,
    memory_bytes: int = 1 << 30,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Finds pairs of near-duplicate clips.

    For a clip with more than NEIGHBOURS copies, only enough pairs to connect all copies are found.

    Args:
        clips: clips of all datasets.
        min_similarity: fraction of bits that must agree; higher for short clips.
        num_queries: pairs of two clips with indices from this number on are excluded; None: no
            exclusions.
        memory_bytes: memory for keys and candidates.

    Returns:
        first int64 [m], second int64 [m], similarity float32 [m]; sorted, with first < second.
    """
    best: dict[tuple[int, int], float] = {}
    num_keys = int(np.minimum(np.diff(clips.starts), KEYS_PER_CLIP).sum())
    key_bits = int(np.clip(num_keys.bit_length(), LEAST_KEY_BITS, MAX_KEY_BITS))
    num_parts = 1 + num_keys * BYTES_PER_KEY // memory_bytes
    last_query = len(clips) if num_queries is None else num_queries
    for table in range(NUM_TABLES):
        lowest_bit = table * (NUM_BITS - key_bits) // (NUM_TABLES - 1)
        for part in range(num_parts):
            keys = _sorted_keys(
                clips, lowest_bit=lowest_bit, key_bits=key_bits, part=part, num_parts=num_parts
            )
            for candidates in _candidates(clips.words, keys, last_query=last_query):
                _compare(clips, candidates, min_similarity=min_similarity, best=best)
    pairs = sorted(best)
    first, second = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    return first, second, np.array([best[pair] for pair in pairs], dtype=np.float32)


def _sorted_keys(
    clips: ClipWords, *, lowest_bit: int, key_bits: int, part: int, num_parts: int
) -> Keys:
    """Builds the keys of a table whose value modulo `num_parts` is `part`."""
    values, indices = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
    for start in range(0, len(clips), CLIPS_AT_ONCE):
        starts = clips.starts[start : start + CLIPS_AT_ONCE + 1]
        words = np.asarray(clips.words[starts[0] : starts[-1]])
        found = words >> np.uint32(lowest_bit) & np.uint32((1 << key_bits) - 1)
        clip = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        chosen = _smallest_of_each(clip, found * HASH_FACTOR, is_usable=words != 0)
        chosen = chosen[found[chosen] % num_parts == part]
        values.append(found[chosen])
        indices.append(chosen + starts[0])
    value, index = np.concatenate(values), np.concatenate(indices)
    order = np.lexsort((index, value))
    value, index = value[order], index[order]
    clip = np.searchsorted(clips.starts, index, side="right") - 1
    return Keys(value, index, clip, index - clips.starts[clip], np.diff(clips.starts)[clip])


def _smallest_of_each(clip: np.ndarray, value: np.ndarray, *, is_usable: np.ndarray) -> np.ndarray:
    """Returns the first indices of the KEYS_PER_CLIP smallest values of each clip, int64 [k]."""
    order = np.lexsort((value, clip))
    order = order[is_usable[order]]
    clip, value = clip[order], value[order]
    is_first = np.ones(len(order), dtype=bool)
    is_first[1:] = (clip[1:] != clip[:-1]) | (value[1:] != value[:-1])
    order, clip = order[is_first], clip[is_first]
    rank = np.arange(len(clip)) - np.searchsorted(clip, clip)
    return order[rank < KEYS_PER_CLIP]


def _candidates(words: np.ndarray, keys: Keys, *, last_query: int) -> Iterator[np.ndarray]:
    """Yields int64 [c, 3]: (first clip, second clip, shift) whose words around a key agree."""
    left = np.flatnonzero(keys.clips < last_query)
    for distance in range(1, NEIGHBOURS + 1):
        left = left[left < len(keys.values) - distance]
        left = left[keys.values[left] == keys.values[left + distance]]
        for start in range(0, len(left), CANDIDATES_AT_ONCE):
            pairs = left[start : start + CANDIDATES_AT_ONCE, None] + [0, distance]  # [c, 2]
            lengths = keys.lengths[pairs]
            pairs = pairs[lengths.min(axis=1) >= MIN_OVERLAP * lengths.max(axis=1)]
            pairs = pairs[_agree_around(words, keys, pairs)]
            shift = keys.in_clip[pairs[:, 0]] - keys.in_clip[pairs[:, 1]]
            yield np.unique(np.column_stack([keys.clips[pairs], shift]), axis=0)


def _agree_around(words: np.ndarray, keys: Keys, pairs: np.ndarray) -> np.ndarray:
    """Returns whether the words around the shared key agree, within both clips, bool [c].

    Args:
        words: uint32 [all words].
        keys: keys of the clips.
        pairs: int64 [c, 2], indices into `keys`.
    """
    before = np.minimum(keys.in_clip[pairs].min(axis=1), WORDS_AROUND)
    after = (keys.lengths[pairs] - keys.in_clip[pairs]).min(axis=1)
    num_different = np.zeros(len(pairs), dtype=np.int64)
    num_loud = np.zeros(len(pairs), dtype=np.int64)
    for step in range(-WORDS_AROUND, WORDS_AROUND + 1, WORD_STEP):
        inside = np.flatnonzero((-step <= before) & (step < after))
        first, second = words[keys.indices[pairs[inside]] + step].T
        num_different[inside] += np.bitwise_count(first ^ second)
        num_loud[inside] += (first | second) != 0
    return num_different <= (1 - MIN_AGREEMENT_AROUND) * NUM_BITS * num_loud


def _compare(
    clips: ClipWords,
    candidates: np.ndarray,
    *,
    min_similarity: float,
    best: dict[tuple[int, int], float],
) -> None:
    """Records in `best` the highest similarity of each near-duplicate pair over its shifts."""
    for first, second, shift in candidates.tolist():
        similarity, seconds = similarity_at(clips.of(first), clips.of(second), shift=shift)
        if similarity >= required_similarity(seconds, min_similarity=min_similarity):
            pair = (first, second)
            best[pair] = max(similarity, best.get(pair, 0.0))


def audio_similarity(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Computes the similarity in the best alignment with an overlap of at least MIN_OVERLAP.

    Args:
        first: uint32 [words], from `audio_fingerprint.words_of`.
        second: uint32 [words].

    Returns:
        (fraction of bits that agree, compared seconds); (0, 0) for silent clips, or if the lengths
        differ too much.
    """
    longest_shift = int((1 - MIN_OVERLAP) * max(len(first), len(second)))
    shifts = range(-longest_shift, longest_shift + 1)
    return max((similarity_at(first, second, shift=shift) for shift in shifts), default=(0.0, 0.0))


def similarity_at(first: np.ndarray, second: np.ndarray, *, shift: int) -> tuple[float, float]:
    """Computes the similarity in one alignment.

    Word n + shift of the first clip is compared with word n of the second. Words in which both
    clips are silent do not count. See `audio_similarity` for the result.
    """
    longer = max(len(first), len(second))
    first, second = first[max(0, shift) :], second[max(0, -shift) :]
    overlap = min(len(first), len(second))
    if not overlap or overlap < MIN_OVERLAP * longer:
        return 0.0, 0.0
    first, second = first[:overlap], second[:overlap]
    num_loud = np.count_nonzero(first | second)
    if not num_loud:
        return 0.0, 0.0
    num_different = int(np.bitwise_count(first ^ second).sum(dtype=np.int64))
    return 1 - num_different / (NUM_BITS * num_loud), num_loud * WORD_SECONDS


def required_similarity(seconds: float, *, min_similarity: float) -> float:
    """Returns the minimum similarity of near-duplicates for a number of compared seconds."""
    return min_similarity + SHORT_CLIP_MARGIN / np.sqrt(seconds) if seconds else np.inf
