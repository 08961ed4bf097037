"""Similarity of two images, computed from their thumbnails; one image may be a crop of the other.

The crop is aligned by trying windows of the other image, first along one axis and then along the
other. The least similar quarter of the image determines the similarity, so that a different object
or digit counts. Brightness is compared by correlation, and by the difference that remains after
fitting the contrast. Color is compared separately, after fitting the saturation.
"""

from __future__ import annotations

import numpy as np

from data_prep.dedup.crop_windows import AXIS_WINDOWS, FINE_PER_CELL, axis_windows
from data_prep.media.image_fingerprint import CHROMA_SIDE, LUMA_SIDE

FINE_CUTS = tuple(number / 60 for number in range(8))  # fractions of a side that a crop may omit
MAX_FINE_CUT = 0.12
NUM_SWEEPS = 2
NOISE = 10.0  # levels of 255; smaller variation is ignored
QUARTERS = [(slice(top, top + 8), slice(left, left + 8)) for top in (0, 4, 8) for left in (0, 4, 8)]
MAX_GAIN = 1.5  # maximum fitted contrast or saturation; the minimum is 1 / MAX_GAIN
# Mean squared differences, in levels of 255, at which the similarity is 0.
LUMA_SCALE, CHROMA_SCALE = 1500.0, 1000.0
MAX_SHIFT = 48.0  # levels of 255 by which the brightness of equal images may differ
PAIRS_AT_ONCE = 512


def _resampling(side: int, start: float, end: float) -> np.ndarray:
    """Returns a matrix, float32 [side, side], that resamples a window to the full axis."""
    fine = (np.arange(side * FINE_PER_CELL) + 0.5) / (side * FINE_PER_CELL)
    source = ((start + fine * (end - start)) * side).astype(np.int64)
    matrix = np.zeros((side, side), np.float32)
    np.add.at(matrix, (np.arange(side).repeat(FINE_PER_CELL), source), 1 / FINE_PER_CELL)
    return matrix


def _blur() -> np.ndarray:
    """Returns a matrix, float32 [side, side], that blurs an axis with weights 1/4, 1/2, 1/4."""
    near = np.eye(LUMA_SIDE, dtype=np.float32)
    padded = np.pad(near, ((1, 1), (0, 0)), mode="edge")
    return (padded[:-2] + 2 * near + padded[2:]) / 4


FINE_WINDOWS = axis_windows(FINE_CUTS, MAX_FINE_CUT)
LUMA_WINDOWS = np.stack([_resampling(LUMA_SIDE, *window) for window in FINE_WINDOWS])
CHROMA_WINDOWS = np.stack([_resampling(CHROMA_SIDE, *window) for window in FINE_WINDOWS])
FIRST_WINDOWS = np.stack([_resampling(LUMA_SIDE, *window) for window in AXIS_WINDOWS])
BLUR = _blur()


def image_similarity(
    crops: np.ndarray, wholes: np.ndarray, *, is_mirrored: np.ndarray, windows: np.ndarray
) -> np.ndarray:
    """Computes the similarity of pairs, float32 [pairs]; equal images have similarity 1.

    Args:
        crops: uint8 [pairs, SIGNATURE_BYTES], signatures of images that may be crops.
        wholes: uint8 [pairs, SIGNATURE_BYTES], signatures of the other images.
        is_mirrored: bool [pairs], whether to mirror the crop.
        windows: int [pairs], initial windows (of `crop_windows`) for the alignment.
    """
    similarity = np.empty(len(crops), np.float32)
    for first in range(0, len(crops), PAIRS_AT_ONCE):
        part = slice(first, first + PAIRS_AT_ONCE)
        luma, chroma = _planes(crops[part], is_mirrored[part])
        whole_luma, whole_chroma = _planes(wholes[part], np.zeros(len(luma), bool))
        rows, columns = _aligned(luma, whole_luma, windows[part] // len(AXIS_WINDOWS))
        seen = LUMA_WINDOWS[rows] @ whole_luma @ LUMA_WINDOWS[columns].transpose(0, 2, 1)
        seen_chroma = (
            CHROMA_WINDOWS[rows][:, None]
            @ whole_chroma
            @ CHROMA_WINDOWS[columns][:, None].transpose(0, 1, 3, 2)
        )
        similarity[part] = np.minimum(
            _luma_similarity(luma, seen), _chroma_similarity(chroma, seen_chroma)
        )
    return similarity


def rough_similarity(
    crops: np.ndarray, wholes: np.ndarray, *, is_mirrored: np.ndarray, window: int
) -> np.ndarray:
    """Computes correlations of the brightness of crops and a window of wholes, float32 [pairs].

    Args:
        crops: uint8 [pairs, SIGNATURE_BYTES].
        wholes: uint8 [pairs, SIGNATURE_BYTES].
        is_mirrored: bool [pairs], whether to mirror the crop.
        window: window of `crop_windows`.
    """
    luma, whole_luma = _luma(crops, is_mirrored), _luma(wholes, np.zeros(len(wholes), bool))
    row, column = divmod(window, len(AXIS_WINDOWS))
    seen = (FIRST_WINDOWS[row] @ whole_luma) @ FIRST_WINDOWS[column].T
    left, right = luma.reshape(len(luma), -1), seen.reshape(len(seen), -1)
    return _correlation(_centred(left), _centred(right))


def plain_similarity(left: np.ndarray, right: np.ndarray, *, is_mirrored: np.ndarray) -> np.ndarray:
    """Computes the similarity of pairs without crops, float32 [pairs].

    Args:
        left: uint8 [pairs, SIGNATURE_BYTES].
        right: uint8 [pairs, SIGNATURE_BYTES].
        is_mirrored: bool [pairs], whether to mirror the left image.
    """
    luma, chroma = _planes(left, is_mirrored)
    other_luma, other_chroma = _planes(right, np.zeros(len(right), bool))
    return np.minimum(_luma_similarity(luma, other_luma), _chroma_similarity(chroma, other_chroma))


def _luma(signatures: np.ndarray, is_mirrored: np.ndarray) -> np.ndarray:
    """Returns the brightness, float32 [n, 16, 16]."""
    pixels = signatures[:, : LUMA_SIDE**2].astype(np.float32)
    return _mirrored(pixels.reshape(-1, LUMA_SIDE, LUMA_SIDE), is_mirrored)


def _planes(signatures: np.ndarray, is_mirrored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns (brightness, float32 [n, 16, 16]; color differences, float32 [n, 2, 8, 8])."""
    chroma = signatures[:, LUMA_SIDE**2 :].astype(np.float32) - 128
    chroma = _mirrored(chroma.reshape(-1, 2, CHROMA_SIDE, CHROMA_SIDE), is_mirrored)
    return _luma(signatures, is_mirrored), chroma


def _mirrored(planes: np.ndarray, is_mirrored: np.ndarray) -> np.ndarray:
    planes[is_mirrored] = planes[is_mirrored][..., ::-1]
    return planes


def _aligned(
    crops: np.ndarray, wholes: np.ndarray, first_rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the windows in which the whole is most similar to the crop.

    Args:
        crops: float32 [pairs, 16, 16].
        wholes: float32 [pairs, 16, 16].
        first_rows: int [pairs], indices into AXIS_WINDOWS, initial windows along the height.

    Returns:
        (rows, columns), indices into FINE_WINDOWS, int [pairs] each.
    """
    by_rows = FIRST_WINDOWS[first_rows] @ wholes
    for _ in range(NUM_SWEEPS):
        columns = _best_columns(crops, by_rows)
        by_columns = wholes @ LUMA_WINDOWS[columns].transpose(0, 2, 1)
        rows = _best_columns(crops.transpose(0, 2, 1), by_columns.transpose(0, 2, 1))
        by_rows = LUMA_WINDOWS[rows] @ wholes
    return rows, columns


def _best_columns(crops: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Returns the windows along the last axis with the highest correlation, int [pairs]."""
    num, num_windows = len(crops), len(LUMA_WINDOWS)
    flat = LUMA_WINDOWS.reshape(-1, LUMA_SIDE)  # [windows * 16, 16]
    seen = wholes.reshape(-1, LUMA_SIDE) @ flat.T  # [pairs * 16, windows * 16]
    seen = seen.reshape(num, LUMA_SIDE, num_windows, LUMA_SIDE)
    centred = crops - crops.mean(axis=(1, 2), keepdims=True)
    covariance = np.einsum("prwc,prc->pw", seen, centred)
    means = seen.mean(axis=(1, 3))
    variance = np.einsum("prwc,prwc->pw", seen, seen) / LUMA_SIDE**2 - means**2
    return (covariance / np.sqrt(np.maximum(variance, 0) + NOISE**2)).argmax(axis=1)


def _luma_similarity(crops: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Computes the similarity of the least similar quarter; inputs are float32 [pairs, 16, 16]."""
    shift = np.abs(crops.mean(axis=(1, 2)) - seen.mean(axis=(1, 2)))
    crops, seen = BLUR @ crops @ BLUR.T, BLUR @ seen @ BLUR.T
    worst = np.ones(len(crops), np.float32)
    for rows, columns in QUARTERS:
        left, right = (
            _centred(planes[:, rows, columns].reshape(len(planes), -1)) for planes in (crops, seen)
        )
        difference = _mean_square_difference(left, right) / LUMA_SCALE
        worst = np.minimum(worst, np.minimum(_correlation(left, right), 1 - difference))
    return np.where(shift <= MAX_SHIFT, worst, 0)


def _centred(values: np.ndarray) -> np.ndarray:
    """Subtracts the mean of each row from [pairs, values]."""
    return values - values.mean(axis=1, keepdims=True)


def _correlation(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Correlates centred [pairs, values]; rows that vary less than NOISE count as correlated."""
    noise = NOISE**2 * left.shape[1]
    covariance = np.einsum("pv,pv->p", left, right) + noise
    variances = [np.einsum("pv,pv->p", values, values) + noise for values in (left, right)]
    return covariance / np.sqrt(variances[0] * variances[1])


def _mean_square_difference(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Returns the mean squared difference, [pairs], after optimal scaling of the second image."""
    covariance = np.einsum("pv,pv->p", left, right) + 1
    energy = np.einsum("pv,pv->p", right, right) + 1
    gain = np.clip(covariance / energy, 1 / MAX_GAIN, MAX_GAIN)
    difference = left - gain[:, None] * right
    return np.einsum("pv,pv->p", difference, difference) / left.shape[1]


def _chroma_similarity(crops: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Compares colors after fitting the saturation; inputs are float32 [pairs, 2, 8, 8]."""
    left, right = crops.reshape(len(crops), -1), seen.reshape(len(seen), -1)
    return 1 - 2 * _mean_square_difference(left, right) / CHROMA_SCALE
