"""Keyed randomness (a counter-based RNG): permutations and random numbers as functions of a key.

No state is kept between calls, so the result does not depend on who calls, or in which order.
"""

from __future__ import annotations

import hashlib

import numpy as np

FEISTEL_ROUNDS = 6
GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # increment of splitmix64
MASK = (1 << 64) - 1
NUM_TABLES_KEPT = 8
# Of the random numbers of samples and dropout; 1 did not depend on the view.
DRAWS_VERSION = 2


def key_of(*parts: int | str) -> int:
    """Returns a 64-bit key that depends on all of `parts` and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def scramble(values: np.ndarray) -> np.ndarray:
    """Maps uint64 to uint64 bijectively, mixing all bits (splitmix64)."""
    values = values + np.uint64(GOLDEN_GAMMA)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permute(indices: np.ndarray, *, sizes: np.ndarray | int, keys: np.ndarray | int) -> np.ndarray:
    """Applies a keyed bijection of [0, size) to every index: a cycle-walking Feistel network.

    The network permutes the next power of four. A value outside [0, size) goes through it again
    until it falls inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").

    Args:
        indices: int64, each in [0, size).
        sizes: size of the domain, one for all or one per index; below 2**52.
        keys: 64-bit key, one for all or one per index.
    """
    indices = np.asarray(indices, dtype=np.int64)
    sizes = np.broadcast_to(np.asarray(sizes, dtype=np.int64), indices.shape)
    keys = np.broadcast_to(np.asarray(keys, dtype=np.uint64), indices.shape)
    num_bits = np.frexp((sizes - 1).astype(np.float64))[1]  # bits that size - 1 needs
    half_bits = np.maximum(1, (num_bits + 1) // 2).astype(np.uint64)
    permuted = indices.astype(np.uint64)
    outside = np.ones(indices.shape, dtype=bool)
    while outside.any():
        permuted[outside] = _feistel(permuted[outside], half_bits[outside], keys[outside])
        outside = permuted >= sizes.astype(np.uint64)
    return permuted.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: np.ndarray, keys: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for number in range(FEISTEL_ROUNDS):
        round_keys = scramble(keys + np.uint64(number))
        left, right = right, left ^ (scramble(right ^ round_keys) & mask)
    return (left << half_bits) | right


class SampleRandom:
    """Endless sequence of random numbers of one sample in one epoch.

    The generator is splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators").
    """

    __slots__ = ("_state",)

    def __init__(self, key: int) -> None:
        self._state = key

    def random(self) -> float:
        """Returns the next number, in [0, 1)."""
        self._state = (self._state + GOLDEN_GAMMA) & MASK
        value = self._state
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
        return ((value ^ (value >> 31)) >> 11) * 2.0**-53

    def below(self, bound: int) -> int:
        """Returns the next number as an integer in [0, bound)."""
        return int(self.random() * bound)


def sample_random(seed: int, *, source: str, epoch: int, ordinal: int, view: str) -> SampleRandom:
    """Returns the random numbers of a view of a sample in an epoch, for its crop, caption, ...

    They are the same on every rank and in every attempt.
    """
    return SampleRandom(key_of(seed, source, epoch, ordinal, view))


def newest(tables: dict) -> dict:
    """Returns the last few tables made; steps go through epochs and blocks in order."""
    return dict(list(tables.items())[-NUM_TABLES_KEPT:])
