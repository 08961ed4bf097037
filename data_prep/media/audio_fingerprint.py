"""Audio fingerprints for near-duplicate search.

The method follows Haitsma and Kalker, "A Highly Robust Audio Fingerprinting System" (2002). The
loudness difference between bands b and b + 1 changes over time; bit b of word t is the sign of that
change. Gain and equalisation do not affect it; codecs, resampling and faint noise rarely do.
In contrast to the paper, frames are shorter (for clips of half a second), and loudness is
logarithmic.
"""

from __future__ import annotations

import numpy as np

RATE_HZ = 8000  # all clips are compared at this rate
FRAME_SAMPLES = 1024  # 128 ms, weighted by a Hann window
HOP_SAMPLES = 128
WORD_SECONDS = HOP_SAMPLES / RATE_HZ
LAG_FRAMES = 4  # distance between the two differences that a bit compares
NUM_BITS = 32  # per word
LOWEST_HZ, HIGHEST_HZ = 200.0, 3400.0  # range of NUM_BITS + 1 bands, equally wide in octaves
FLOOR = 1e-4  # fraction of the clip's mean energy below which a frame counts as silent
FRAMES_AT_ONCE = 4096  # limits memory use


def audio_fingerprint(waveform: np.ndarray, sample_rate_hz: int) -> dict[str, bytes]:
    """Computes the column `fingerprint` of a clip.

    Args:
        waveform: float32 [samples], mono, finite.
        sample_rate_hz: sample rate of the waveform.

    Returns:
        {"fingerprint": ...}: one little-endian word of NUM_BITS bits per WORD_SECONDS, without the
        first LAG_FRAMES words; a silent word is 0.
    """
    energies = _band_energies(_resampled(waveform, sample_rate_hz))  # [frames, bands]
    if len(energies) <= LAG_FRAMES or not energies.any():
        return {"fingerprint": bytes(4 * max(0, len(energies) - LAG_FRAMES))}
    floor = FLOOR * energies.mean()
    loudness = np.log(energies + floor)
    differences = loudness[:, 1:] - loudness[:, :-1]  # [frames, NUM_BITS]
    bits = differences[LAG_FRAMES:] > differences[:-LAG_FRAMES]
    is_loud = energies.mean(axis=1) > floor
    bits[~(is_loud[LAG_FRAMES:] | is_loud[:-LAG_FRAMES])] = False
    return {"fingerprint": np.packbits(bits, axis=1, bitorder="little").tobytes()}


def words_of(fingerprint: bytes) -> np.ndarray:
    """Returns the words of a fingerprint: uint32 [words]."""
    return np.frombuffer(fingerprint, "<u4")


def _resampled(waveform: np.ndarray, sample_rate_hz: int) -> np.ndarray:
    waveform = waveform.astype(np.float32, copy=False)
    if sample_rate_hz == RATE_HZ or not len(waveform):
        return waveform
    import soxr

    return soxr.resample(waveform, sample_rate_hz, RATE_HZ, quality="LQ")


def _band_energies(waveform: np.ndarray) -> np.ndarray:
    """Computes the mean power of each band in each frame: float64 [frames, NUM_BITS + 1]."""
    samples = np.pad(waveform, FRAME_SAMPLES // 2)  # so that short clips have frames
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME_SAMPLES)[::HOP_SAMPLES]
    window = np.hanning(FRAME_SAMPLES).astype(np.float32)
    bands = _bands()
    energies = [np.empty((0, NUM_BITS + 1))]
    for start in range(0, len(frames), FRAMES_AT_ONCE):
        spectrum = np.fft.rfft(frames[start : start + FRAMES_AT_ONCE] * window)
        energies.append((spectrum.real**2 + spectrum.imag**2).astype(np.float64) @ bands)
    return np.concatenate(energies)


def _bands() -> np.ndarray:
    """Returns the weight of each bin in each band's mean: float64 [bins, NUM_BITS + 1]."""
    bin_hz = RATE_HZ / FRAME_SAMPLES
    edges = np.geomspace(LOWEST_HZ, HIGHEST_HZ, NUM_BITS + 2)
    low = (np.arange(FRAME_SAMPLES // 2 + 1) - 0.5)[:, None] * bin_hz
    overlap = np.minimum(low + bin_hz, edges[1:]) - np.maximum(low, edges[:-1])
    return np.maximum(overlap, 0) / np.diff(edges)
