"""Waveforms to standardised log-mel pictures, on the device, by torch alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank

from pretrain.config import AudioTransform

# 10 log10 of this is the floor, -100 dB: silence.
SMALLEST_POWER = 1e-10


class LogMelSpectrogram(nn.Module):
    """10 log10 of the mel-filtered power spectrum, minus mean_db, over std_db.

    Frames are centred on multiples of hop_samples, with reflected ends: S = 1 + samples // hop.
    """

    def __init__(self, config: AudioTransform) -> None:
        super().__init__()
        self.settings = config.log_mel
        bank = mel_filter_bank(
            num_frequency_bins=self.settings.fft_samples // 2 + 1,
            num_mel_filters=self.settings.num_mel_bins,
            min_frequency=self.settings.low_hz,
            max_frequency=self.settings.high_hz,
            sampling_rate=config.sample_rate_hz,
            norm=self.settings.mel_norm,
            mel_scale=self.settings.mel_scale,
        )
        window = torch.hann_window(self.settings.fft_samples)
        self.register_buffer("bank", torch.from_numpy(bank).float().T, persistent=False)
        self.register_buffer("window", window, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor) -> Tensor:
        """[B, samples] float32 -> [B, 1, F, S] float32, also under autocast."""
        with torch.autocast(waveforms.device.type, enabled=False):
            spectrum = torch.stft(
                waveforms.float(),
                n_fft=self.settings.fft_samples,
                hop_length=self.settings.hop_samples,
                window=self.window,
                center=True,
                pad_mode="reflect",
                return_complex=True,
            )  # [B, samples] -> [B, fft / 2 + 1, S]
            power = self.bank @ spectrum.abs().square()  # [B, fft / 2 + 1, S] -> [B, F, S]
            decibels = 10 * power.clamp(min=SMALLEST_POWER).log10()
            standardised = (decibels - self.settings.mean_db) / self.settings.std_db
            return standardised[:, None]  # [B, F, S] -> [B, 1, F, S]
