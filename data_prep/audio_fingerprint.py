"""What near-duplicate clips are found by: how loud each frequency band is over time, coarsely.

Loudness is in decibels above a floor that is relative to the clip's own mean, so that gain does not
matter and what lies far below the mean (silence, faint noise) does not count. Bands are in Hz and
frames in seconds, so that the sample rate does not matter either; the bands end where telephone
speech does, because codecs and low rates lose what is above.
"""

from __future__ import annotations

import numpy as np

NUM_BANDS = 16  # equally wide on a logarithmic scale
LOWEST_HZ, HIGHEST_HZ = 150.0, 3400.0
FRAME_SECONDS = 0.16
HOP_SECONDS = 0.04
ENOUGH_HZ = 16_000  # higher rates are brought down by averaging neighbouring samples
FLOOR_DB = -30.0  # below the mean of all bands and frames
STEP_DB = 3.0  # a level; 4 bits hold 16 of them
FRAMES_AT_ONCE = 512  # bounds the memory


def audio_fingerprint(waveform: np.ndarray, sample_rate_hz: int) -> dict[str, bytes]:
    """The column fingerprint of a clip.

    Args:
        waveform: float32 [samples], mono, finite.
        sample_rate_hz: of the waveform.

    Returns:
        fingerprint: NUM_BANDS / 2 bytes for each frame, which is each HOP_SECONDS; two levels of
        neighbouring bands in a byte, the lower band in the lower half. Silence is all zeros.
    """
    factor = max(1, sample_rate_hz // ENOUGH_HZ)
    energies = _band_energies(_decimated(waveform, factor), sample_rate_hz / factor)
    mean = energies.mean()
    if not mean > 0:
        levels = np.zeros(energies.shape, np.uint8)
    else:
        floor = mean * 10 ** (FLOOR_DB / 10)
        decibels = 10 * np.log10(energies / floor + 1)
        levels = np.minimum(decibels / STEP_DB, 15).astype(np.uint8)
    return {"fingerprint": (levels[:, ::2] | levels[:, 1::2] << 4).tobytes()}


def levels_of(fingerprint: bytes) -> np.ndarray:
    """uint8 [frames, NUM_BANDS], each from 0 to 15: what a fingerprint holds."""
    pairs = np.frombuffer(fingerprint, np.uint8).reshape(-1, NUM_BANDS // 2)
    return np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(-1, NUM_BANDS)


def _decimated(waveform: np.ndarray, factor: int) -> np.ndarray:
    """The means of `factor` samples in a row; the last few are left out."""
    if factor == 1 or len(waveform) < factor:
        return waveform
    whole = len(waveform) // factor * factor
    return waveform[:whole].reshape(-1, factor).mean(axis=1)


def _band_energies(waveform: np.ndarray, rate_hz: float) -> np.ndarray:
    """float64 [frames, NUM_BANDS]: the mean power of each band, around each frame's time."""
    frame_length = max(2, round(FRAME_SECONDS * rate_hz))
    num_frames = max(1, round((len(waveform) / rate_hz - FRAME_SECONDS) / HOP_SECONDS) + 1)
    starts = np.rint(np.arange(num_frames) * (HOP_SECONDS * rate_hz)).astype(np.int64)
    padding = max(0, int(starts[-1]) + frame_length - len(waveform))
    samples = np.pad(waveform.astype(np.float32, copy=False), (0, padding))
    frames = np.lib.stride_tricks.sliding_window_view(samples, frame_length)
    window = np.hanning(frame_length + 2)[1:-1].astype(np.float32)
    num_points = 1 << (frame_length - 1).bit_length()  # of the transform: a power of two
    bands = _bands(num_points, rate_hz)
    return np.concatenate(
        [
            _power(frames[starts[first : first + FRAMES_AT_ONCE]] * window, num_points, len(bands))
            @ bands
            for first in range(0, num_frames, FRAMES_AT_ONCE)
        ]
    )


def _power(frames: np.ndarray, num_points: int, num_bins: int) -> np.ndarray:
    """float64 [frames, bins]"""
    spectrum = np.fft.rfft(frames, num_points)[:, :num_bins]
    return spectrum.real.astype(np.float64) ** 2 + spectrum.imag.astype(np.float64) ** 2


def _bands(num_points: int, rate_hz: float) -> np.ndarray:
    """float64 [bins up to HIGHEST_HZ, NUM_BANDS]: the share of each bin in each band's mean."""
    bin_hz = rate_hz / num_points
    edges = np.geomspace(LOWEST_HZ, HIGHEST_HZ, NUM_BANDS + 1)
    num_bins = min(num_points // 2 + 1, int(HIGHEST_HZ / bin_hz) + 2)
    low = (np.arange(num_bins) - 0.5) * bin_hz
    overlap = np.minimum(low[:, None] + bin_hz, edges[1:]) - np.maximum(low[:, None], edges[:-1])
    return np.maximum(overlap, 0) / np.diff(edges)
