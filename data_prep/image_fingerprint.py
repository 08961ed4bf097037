"""What near-duplicate pictures are found by: a perceptual hash, and a thumbnail that confirms.

The hash says whether each low frequency of the picture is above or below their median, so that it
hardly changes with size, compression, brightness and contrast. Pictures that are not alike share it
now and then; the thumbnail (see data_prep.image_similarity) tells them apart.

Both come from the same reduced picture of 32 x 32 pixels, in whole numbers: equal pixels give equal
fingerprints on every machine.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

GRID = 32  # pixels on a side of the reduced picture
NUM_FREQUENCIES = 8  # in each direction
MAX_ROWS = 512  # of taller pictures, rows in between are left out
LUMA_WEIGHTS = np.array([77, 150, 29])  # of red, green and blue, in 1/256
LUMA_SIDE = 16  # pixels of the thumbnail's brightness
CHROMA_SIDE = 8  # and of its two colour differences
SIGNATURE_BYTES = LUMA_SIDE**2 + 2 * CHROMA_SIDE**2


def _cosines() -> np.ndarray:
    """[8, 32] float64 holding whole numbers: the DCT-II's basis, times 4096.

    Sums of whole numbers are exact in float64, in any order.
    """
    frequency, place = np.mgrid[:NUM_FREQUENCIES, :GRID]
    return np.rint(4096 * np.cos(np.pi * frequency * (2 * place + 1) / (2 * GRID)))


COSINES = _cosines()
BITS = np.uint64(1) << np.arange(NUM_FREQUENCIES**2, dtype=np.uint64)
# Mirrored left to right, every odd horizontal frequency changes its sign.
MIRRORING = np.where(np.arange(NUM_FREQUENCIES) % 2, -1.0, 1.0)


def image_fingerprint(pixels: np.ndarray) -> dict[str, Any]:
    """The columns phash, phash_mirrored and signature of a picture.

    Args:
        pixels: uint8 [H, Wd, 3] of any size from 1 x 1, RGB.

    Returns:
        phash: 64 bits, as a whole number; phash_mirrored: of the picture mirrored left to right;
        signature: SIGNATURE_BYTES bytes: brightness [16, 16], then blue and red difference [8, 8].
    """
    reduced = _reduced(pixels)  # [32, 32, 3]
    luma = (reduced @ LUMA_WEIGHTS).astype(np.float64)  # [32, 32], in 1/256
    frequencies = COSINES @ luma @ COSINES.T  # [8 vertical, 8 horizontal]
    return {
        "phash": _signs(frequencies),
        "phash_mirrored": _signs(frequencies * MIRRORING),
        "signature": _signature(reduced),
    }


def _reduced(pixels: np.ndarray) -> np.ndarray:
    """int64 [32, 32, 3]: the whole picture, whatever its shape, averaged in squares."""
    pixels = pixels[:: max(1, len(pixels) // MAX_ROWS)]
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    size = (GRID, GRID)
    reduced = picture.resize(size, Image.Resampling.BILINEAR, reducing_gap=2.0)
    return np.asarray(reduced).astype(np.int64)


def _signs(frequencies: np.ndarray) -> int:
    """Bit n: is frequency n above the median? The first, which is the mean, takes no part."""
    values = frequencies.ravel()[1:]
    return int(BITS[1:][values > np.median(values)].sum())


def _signature(reduced: np.ndarray) -> bytes:
    luma = _block_means(reduced @ LUMA_WEIGHTS, LUMA_SIDE) >> 8
    difference = reduced[:, :, [2, 0]] - (reduced @ LUMA_WEIGHTS >> 8)[:, :, None]  # [32, 32, 2]
    chroma = _block_means(difference, CHROMA_SIDE) // 2 + 128
    planes = (luma, chroma[:, :, 0], chroma[:, :, 1])
    return b"".join(plane.astype(np.uint8).tobytes() for plane in planes)


def _block_means(plane: np.ndarray, side: int) -> np.ndarray:
    """[32, 32, ...] -> [side, side, ...]"""
    block = GRID // side
    squares = plane.reshape(side, block, side, block, *plane.shape[2:])
    return squares.sum(axis=(1, 3)) // block**2
