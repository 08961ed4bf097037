"""How alike two clips are: the share of bits that agree in their best alignment.

Unrelated clips agree in about half of their bits. The fewer bits there are, the further chance (and
the likeness of short words by one speaker) strays from that, so that short clips must agree more.
"""

from __future__ import annotations

import numpy as np

from data_prep.media.audio_fingerprint import NUM_BITS, WORD_SECONDS

MIN_OVERLAP = 0.8  # of the longer clip: a part cut out of a long recording is another clip
SHORT_CLIP_MARGIN = 0.055  # of similarity, for one second of sound


def audio_similarity(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """Similarity in the best alignment that lets the clips overlap by MIN_OVERLAP.

    Args:
        first: uint32 [words], of audio_fingerprint.words_of.
        second: uint32 [words].

    Returns:
        (share of bits that agree, seconds of sound that were compared); (0, 0) for silent clips and
        those of too different lengths.
    """
    longest_shift = int((1 - MIN_OVERLAP) * max(len(first), len(second)))
    shifts = range(-longest_shift, longest_shift + 1)
    return max((similarity_at(first, second, shift=shift) for shift in shifts), default=(0.0, 0.0))


def similarity_at(first: np.ndarray, second: np.ndarray, *, shift: int) -> tuple[float, float]:
    """As audio_similarity, in one alignment: word n + shift of the first over word n of the second.

    Words in which both clips are silent do not count.
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
    """What clips of which so much was compared must reach, to be taken for near-duplicates."""
    return min_similarity + SHORT_CLIP_MARGIN / np.sqrt(seconds) if seconds else np.inf
