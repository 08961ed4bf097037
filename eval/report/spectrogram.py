"""Spectrograms of audio clips as images, for reports."""

from __future__ import annotations

import itertools

import numpy as np
import torch

WINDOW = 512
NUM_BANDS = 48
NUM_COLUMNS = 160
RANGE_DB = 70.0  # levels more than this below the peak are drawn in the darkest colour
# From dark to light in perceptually uniform steps.
COLORS = np.array([[12, 8, 38], [84, 15, 109], [187, 55, 84], [249, 142, 8], [252, 255, 164]])


def spectrogram_picture(waveform: np.ndarray) -> np.ndarray:
    """Draws a spectrogram: time on the x axis, frequency on a logarithmic y axis.

    Args:
        waveform: float32 [samples], mono, at any sample rate.

    Returns:
        uint8 [NUM_BANDS, NUM_COLUMNS, 3].
    """
    padded = np.pad(waveform, (0, max(0, WINDOW - len(waveform))))
    hop = max(1, (len(padded) - WINDOW) // NUM_COLUMNS)
    frames = torch.from_numpy(padded.astype(np.float32)).unfold(0, WINDOW, hop)[:NUM_COLUMNS]
    power = torch.fft.rfft(frames * torch.hann_window(WINDOW)).abs().square().numpy()
    edges = np.geomspace(2, WINDOW // 2, NUM_BANDS + 1)  # bins
    bands = [
        power[:, int(low) : max(int(low) + 1, int(high))].mean(axis=1)
        for low, high in itertools.pairwise(edges)
    ]
    decibels = 10 * np.log10(np.maximum(np.stack(bands[::-1]), 1e-12))  # [bands, frames]
    shades = np.clip((decibels - decibels.max()) / RANGE_DB + 1, 0, 1)
    stretched = shades[:, np.linspace(0, shades.shape[1] - 1, NUM_COLUMNS).round().astype(int)]
    levels = np.linspace(0, 1, len(COLORS))
    channels = [np.interp(stretched, levels, COLORS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)
