"""Image fingerprints for near-duplicate search: a perceptual hash and a thumbnail.

Each bit of the hash is the sign of a low-frequency DCT coefficient of the brightness. Changes of
size, compression, brightness and contrast rarely affect it. Different images sometimes share a
hash; the thumbnail distinguishes them (data_prep.dedup.image_similarity). The hashes of cropped
copies are also computed from the thumbnail (data_prep.dedup.crop_windows).

Both are computed in integer arithmetic from the same reduced image of 32 x 32 pixels. Equal pixels
therefore have equal fingerprints on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

GRID = 32  # pixels per side of the reduced image
MAX_SIDE = 256  # rows; intermediate rows of larger images are skipped
LUMA_WEIGHTS = np.array([77.0, 150.0, 29.0]) / 256  # weights of red, green and blue
LUMA_SIDE = 16  # pixels per side of the thumbnail's brightness
CHROMA_SIDE = 8  # pixels per side of its two colour differences
SIGNATURE_BYTES = LUMA_SIDE**2 + 2 * CHROMA_SIDE**2
NUM_FREQUENCIES = 9  # per direction; the hash uses the 64 lowest of the 80 nonconstant ones
# Smaller amplitudes (in levels of 255) are noise in a flat image.
MIN_AMPLITUDE = 0.05
COSINE_SCALE = 4096


def _lowest_frequencies() -> np.ndarray:
    """Returns int [2, 64]: (vertical, horizontal) frequency of each bit, lowest first."""
    every = [(i, j) for i in range(NUM_FREQUENCIES) for j in range(NUM_FREQUENCIES) if i or j]
    return np.array(sorted(every, key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, pair))[:64]).T


def _cosines() -> np.ndarray:
    """Returns the DCT-II basis times COSINE_SCALE: float64 [9, 32] of integers.

    Sums of integers are exact in float64, in any order.
    """
    frequency, place = np.mgrid[:NUM_FREQUENCIES, :GRID]
    return np.rint(COSINE_SCALE * np.cos(np.pi * frequency * (2 * place + 1) / (2 * GRID)))


def _blocks(side: int) -> np.ndarray:
    """Returns float64 [side, 32], which sums each of `side` equal parts."""
    return np.kron(np.eye(side), np.ones(GRID // side))


FREQUENCIES = _lowest_frequencies()
COSINES = _cosines()
LUMA_BLOCKS, CHROMA_BLOCKS = _blocks(LUMA_SIDE), _blocks(CHROMA_SIDE)
# Mirroring left to right changes the sign of every odd horizontal frequency.
MIRRORING = np.where(FREQUENCIES[1] % 2, -1.0, 1.0)
THRESHOLD = MIN_AMPLITUDE * 256 * (GRID * COSINE_SCALE) ** 2


def image_fingerprint(pixels: np.ndarray) -> dict[str, Any]:
    """Computes the columns phash, phash_mirrored and signature of an image.

    Args:
        pixels: uint8 [H, Wd, 3] of any size from 1 x 1, RGB.

    Returns:
        phash: 64 bits, as an integer.
        phash_mirrored: phash of the image mirrored left to right.
        signature: SIGNATURE_BYTES bytes: brightness [16, 16], then blue and red difference [8, 8].
    """
    reduced = _reduced(pixels)  # [32, 32, 3]
    luma = reduced @ (LUMA_WEIGHTS * 256)  # [32, 32], in 1/256
    amplitudes = (COSINES @ luma @ COSINES.T)[FREQUENCIES[0], FREQUENCIES[1]]  # [64]
    return {
        "phash": _packed(amplitudes > THRESHOLD),
        "phash_mirrored": _packed(amplitudes * MIRRORING > THRESHOLD),
        "signature": _signature(reduced, luma),
    }


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """Reduces an image of any size to float64 [32, 32, 3] of integers."""
    pixels = pixels[:: max(1, len(pixels) // MAX_SIDE)]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    size = (GRID, GRID)
    reduced = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(reduced, dtype=np.float64)


def _packed(bits: np.ndarray) -> int:
    return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")


def _signature(reduced: np.ndarray, luma: np.ndarray) -> bytes:
    """Computes the thumbnail in integer arithmetic.

    Args:
        reduced: float64 [32, 32, 3].
        luma: float64 [32, 32], in 1/256.
    """
    small_luma = LUMA_BLOCKS @ luma @ LUMA_BLOCKS.T // (256 * 4)  # [16, 16]
    colours = CHROMA_BLOCKS @ reduced.transpose(2, 0, 1) @ CHROMA_BLOCKS.T  # [3, 8, 8], times 16
    mean = CHROMA_BLOCKS @ luma @ CHROMA_BLOCKS.T / 256  # [8, 8], times 16
    differences = (colours[[2, 0]] - mean) // 32 + 128  # [2, 8, 8]
    return small_luma.astype(np.uint8).tobytes() + differences.astype(np.uint8).tobytes()
