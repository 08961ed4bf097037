"""Standardised log-mel spectrograms, computed from waveforms on the device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pretrain.config import AudioTransform

# 10 log10 of this is -100 dB, the level of silence.
SMALLEST_POWER = 1e-10


class LogMelSpectrogram(nn.Module):
    """10 log10 of the mel-filtered power spectrum, minus mean_db, over std_db.

    Frames are centred on multiples of hop_samples, and both ends are padded by reflection, so
    S = 1 + samples // hop_samples.
    """

    def __init__(self, config: AudioTransform) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        self.settings = config.log_mel
        spec = config.spec_augment
        self.num_freq_masks = spec.num_mel_stripes if spec else 0
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
    def forward(self, waveforms: Tensor, spec_masks: Tensor | None = None) -> Tensor:
        """Computes spectrograms: float32 [B, samples] -> [B, 1, F, S], also under autocast.

        Args:
            waveforms: float32 [B, samples].
            spec_masks: [B, masks, 2] (start, width) of SpecAugment's masks, frequency masks first;
                None or empty in evaluation.
        """
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
            mel = (decibels - self.settings.mean_db) / self.settings.std_db
            if spec_masks is not None and spec_masks.shape[1]:
                freq_masks = spec_masks[:, : self.num_freq_masks]
                mel = fill_masks(mel, freq_masks, time_masks=spec_masks[:, self.num_freq_masks :])
            return mel[:, None]  # [B, F, S] -> [B, 1, F, S]


def fill_masks(mel: Tensor, freq_masks: Tensor, *, time_masks: Tensor) -> Tensor:
    """Fills masks of log-mel spectrograms with the mean of each spectrogram (SpecAugment).

    Args:
        mel: [B, F, S].
        freq_masks: [B, masks, 2] (start, width) in mel bins.
        time_masks: [B, masks, 2] (start, width) in frames.
    """
    freq_mask = _covered(mel.shape[1], freq_masks)  # [B, F]
    time_mask = _covered(mel.shape[2], time_masks)  # [B, S]
    mean = mel.mean(dim=(1, 2), keepdim=True)
    return torch.where(freq_mask[:, :, None] | time_mask[:, None, :], mean, mel)


def _covered(length: int, masks: Tensor) -> Tensor:
    """Bool [B, length]: the indices that any of the masks [B, n, 2] (start, width) covers."""
    indices = torch.arange(length, device=masks.device)
    starts, widths = masks[..., :1], masks[..., 1:]  # [B, n, 1]
    return ((indices >= starts) & (indices < starts + widths)).any(dim=1)
