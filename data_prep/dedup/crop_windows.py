"""Perceptual hashes of windows of an image, computed from its thumbnail, to find cropped copies.

Cropping a tenth of an image changes its perceptual hash too much for a direct comparison. But the
hash of a cropped copy is close to the hash of the same window of the original. The thumbnail is
enough to compute it. The 36 windows cut 0, 5 or 10 % off each side, and at most 10 % off opposite
sides together. Every crop of up to 10 % is close enough to one of them.
"""

from __future__ import annotations

import itertools

import numpy as np

from data_prep.media.image_fingerprint import (
    FREQUENCIES,
    LUMA_SIDE,
    MIN_AMPLITUDE,
    NUM_FREQUENCIES,
    SIGNATURE_BYTES,
)

CUTS = (0.0, 0.05, 0.1)  # fraction of the height or width
MAX_CUT = 0.1  # sum of the cuts off opposite sides
FINE_PER_CELL = 64  # sub-pixel resolution of a window's edges
IMAGES_AT_ONCE = 1024


def axis_windows(cuts: np.ndarray | tuple[float, ...], max_cut: float) -> list[tuple[float, float]]:
    """Returns (start, end) of every window along an axis, as fractions; the first is (0, 1)."""
    return [
        (first, 1 - last)
        for first, last in itertools.product(cuts, cuts)
        if first + last <= max_cut + 1e-9
    ]


AXIS_WINDOWS = axis_windows(CUTS, MAX_CUT)
NUM_WINDOWS = len(AXIS_WINDOWS) ** 2  # window n: n // 6 of the height, n % 6 of the width
FREQUENCY_INDICES = FREQUENCIES[0] * NUM_FREQUENCIES + FREQUENCIES[1]


def window_cosines(start: float, end: float) -> np.ndarray:
    """Computes the DCT-II basis over a window of an axis, float32 [NUM_FREQUENCIES, LUMA_SIDE].

    All basis vectors except the first sum to zero, so that a flat window has zero amplitudes.
    """
    fine = (np.arange(LUMA_SIDE * FINE_PER_CELL) + 0.5) / (LUMA_SIDE * FINE_PER_CELL)
    is_inside = (fine >= start) & (fine < end)
    angles = np.pi * np.arange(NUM_FREQUENCIES)[:, None] * (fine - start) / (end - start)
    basis = (np.cos(angles) * is_inside).reshape(NUM_FREQUENCIES, LUMA_SIDE, FINE_PER_CELL)
    basis = basis.mean(axis=2) / (end - start)
    basis[1:] -= basis[1:].sum(axis=1, keepdims=True) * basis[0] / basis[0].sum()
    return (basis / LUMA_SIDE).astype(np.float32)


def window_hashes(signatures: np.ndarray, window: int) -> np.ndarray:
    """Computes the perceptual hash of one window of every image, uint64 [n].

    Args:
        signatures: uint8 [n, SIGNATURE_BYTES], from data_prep.media.image_fingerprint.
        window: 0 to NUM_WINDOWS - 1; 0 is the whole image.
    """
    assert signatures.shape[1] == SIGNATURE_BYTES
    row, column = divmod(window, len(AXIS_WINDOWS))
    down, across = window_cosines(*AXIS_WINDOWS[row]), window_cosines(*AXIS_WINDOWS[column])
    hashes = np.empty(len(signatures), np.uint64)
    for first in range(0, len(signatures), IMAGES_AT_ONCE):
        batch = signatures[first : first + IMAGES_AT_ONCE, : LUMA_SIDE**2]
        pixels = batch.reshape(-1, LUMA_SIDE).astype(np.float32)
        half = (pixels @ across.T).reshape(len(batch), LUMA_SIDE, NUM_FREQUENCIES)
        amplitudes = (down @ half).reshape(len(batch), -1)  # [n, 81]
        bits = np.take(amplitudes > MIN_AMPLITUDE, FREQUENCY_INDICES, axis=1)  # [n, 64]
        packed = np.packbits(bits, axis=1, bitorder="little")
        hashes[first : first + IMAGES_AT_ONCE] = packed.view("<u8")[:, 0]
    return hashes
