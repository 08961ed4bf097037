"""Shingles of captions: sequences of adjacent words, as 64-bit hashes.

Case and punctuation are ignored. In scripts without spaces, each letter is a word. All captions of
a batch are hashed together: the hash of a word is a polynomial over its bytes, computed as the
difference of two prefix sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import regex

BASE = 0x9E3779B97F4A7C15  # base of the polynomial modulo 2**64; odd, so that it has an inverse
SEED = 20231  # seed of the random numbers that represent bytes
NEWLINE = ord("\n")
_UNSPACED = "".join(
    rf"\p{{{name}}}" for name in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)


def shingles_of(captions: Sequence[str], *, shingle_words: int) -> tuple[np.ndarray, np.ndarray]:
    """Computes the shingle sets of captions.

    Args:
        captions: batch of captions.
        shingle_words: number of words per shingle; a shorter caption is one shingle.

    Returns:
        values: uint64 [all shingles], sorted and unique within each caption.
        counts: int64 [captions], 0 for captions without words.
    """
    text = "".join(_plain_words(caption) + "\n" for caption in captions)
    content = np.frombuffer(text.encode("utf-8", errors="replace"), np.uint8)
    words, caption_of = _hashed_words(content)
    values, caption_of = _runs(words, caption_of, length=shingle_words)
    order = np.lexsort((values, caption_of))
    values, caption_of = values[order], caption_of[order]
    is_new = np.ones(len(values), dtype=bool)
    is_new[1:] = (values[1:] != values[:-1]) | (caption_of[1:] != caption_of[:-1])
    return values[is_new], np.bincount(caption_of[is_new], minlength=len(captions))


def mix_bits(numbers: np.ndarray) -> np.ndarray:
    """Mixes the bits of uint64 [...] numbers with the final step of splitmix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _plain_words(caption: str) -> str:
    if caption.isascii():
        return caption.lower().replace("\n", " ")
    spaced = _unspaced_letter().sub(r" \g<0> ", caption.casefold())
    return _other_than_words().sub(" ", spaced)


@lru_cache
def _unspaced_letter() -> regex.Pattern[str]:
    import regex

    return regex.compile(f"[{_UNSPACED}]")


@lru_cache
def _other_than_words() -> regex.Pattern[str]:
    import regex

    return regex.compile(r"[^\w\p{M}]+")


@lru_cache
def _byte_tables() -> tuple[np.ndarray, np.ndarray]:
    """Returns (number of each byte, uint64 [256]; whether it is part of a word, bool [256])."""
    numbers = np.random.Generator(np.random.PCG64(SEED)).integers(0, 2**64, 256, dtype=np.uint64)
    is_word = np.array([chr(byte).isalnum() and byte < 128 for byte in range(256)])
    is_word[128:] = True  # bytes of UTF-8 letters; other characters have been replaced by spaces
    return numbers, is_word


def _hashed_words(content: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (hashes of words, uint64 [words]; their line numbers, int64 [words])."""
    numbers, is_word = _byte_tables()
    in_word = np.concatenate([[False], is_word[content]])
    starts = np.flatnonzero(in_word[1:] & ~in_word[:-1])
    ends = np.flatnonzero(in_word[:-1] & ~in_word[1:])  # a text ends with a newline
    terms = numbers[content] * _powers(BASE, len(content))
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])
    inverse = _powers(pow(BASE, -1, 2**64), len(content))
    words = mix_bits((sums[ends] - sums[starts]) * inverse[starts])
    return words, np.cumsum(content == NEWLINE)[starts]


def _powers(base: int, num: int) -> np.ndarray:
    """Returns base ** 0, base ** 1, ... modulo 2 ** 64, uint64 [num]."""
    factors = np.full(num, base, np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)


def _runs(
    words: np.ndarray, caption_of: np.ndarray, *, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hashes each run of `length` words; a shorter caption is hashed as one run.

    Returns:
        (hashes, caption of each hash)
    """
    end = np.searchsorted(caption_of, caption_of, side="right")  # end of the caption's words
    begin = np.searchsorted(caption_of, caption_of, side="left")
    index = np.arange(len(words))
    first = index[(index + length <= end) | (index == begin)]
    hashes = np.zeros(len(first), np.uint64)
    for step in range(length):
        word = np.where(first + step < end[first], words[(first + step) % max(1, len(words))], 0)
        hashes = mix_bits(hashes * np.uint64(BASE) + word.astype(np.uint64))
    return hashes, caption_of[first]
