"""Standardised log-mel spectrograms, computed from waveforms on the device.

Each front end has the framing, logarithm and floor of the models that were trained with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from pretrain.settings.transforms import AudioTransform, LogMel

# 10 log10 of this is -100 dB, the level of silence.
SMALLEST_POWER = 1e-10
# Kaldi's floor, the epsilon of float32.
SMALLEST_KALDI_POWER = torch.finfo(torch.float32).eps
PREEMPHASIS = 0.97
WHISPER_RANGE = 8.0  # in log10, below the maximum of a clip


class LogMelSpectrogram(nn.Module):
    """Log of the mel-filtered power spectrum, minus mean_db, over std_db.

    `LogMel` describes the front ends.
    """

    def __init__(self, config: AudioTransform) -> None:
        super().__init__()
        self.settings = config.log_mel
        spec = config.spec_augment
        self.num_freq_masks = spec.num_mel_stripes if spec else 0
        bank = _filter_bank(self.settings, sample_rate_hz=config.sample_rate_hz)
        # Kaldi's window is symmetric.
        is_periodic = self.settings.frontend != "kaldi"
        dtype = torch.float32 if is_periodic else torch.float64
        window = torch.hann_window(self.settings.frame_samples, periodic=is_periodic, dtype=dtype)
        self.register_buffer("bank", bank, persistent=False)
        self.register_buffer("window", window, persistent=False)

    @torch.no_grad()
    def forward(self, waveforms: Tensor, spec_masks: Tensor | None = None) -> Tensor:
        """Computes spectrograms: float32 [B, samples] -> [B, 1, F, S], also under autocast.

        Args:
            waveforms: float32 [B, samples].
            spec_masks: [B, masks, 2] (start, width) of SpecAugment's masks, frequency masks first;
                None or empty in evaluation.
        """
        with _in_full_precision(waveforms):
            logarithm = _LOGARITHMS[self.settings.frontend]
            mel = logarithm(waveforms.float(), self.bank, self.window, self.settings)
            mel = self._with_num_frames(mel)
            mel = (mel - self.settings.mean_db) / self.settings.std_db
            if spec_masks is not None and spec_masks.shape[1]:
                freq_masks = spec_masks[:, : self.num_freq_masks]
                mel = fill_masks(mel, freq_masks, time_masks=spec_masks[:, self.num_freq_masks :])
            return mel[:, None]  # [B, F, S] -> [B, 1, F, S]

    def _with_num_frames(self, mel: Tensor) -> Tensor:
        """[B, F, S], cut or padded at the end"""
        num_frames = self.settings.num_frames
        if num_frames is None:
            return mel
        silence = _SILENCE[self.settings.frontend]
        return functional.pad(mel, (0, num_frames - mel.shape[2]), value=silence)


def _in_full_precision(waveforms: Tensor) -> AbstractContextManager[None]:
    """A context without autocast, which the meta device does not have."""
    if waveforms.is_meta:
        return nullcontext()
    return torch.autocast(waveforms.device.type, enabled=False)


def _filter_bank(settings: LogMel, *, sample_rate_hz: int) -> Tensor:
    """[F, fft / 2 + 1]"""
    from transformers.audio_utils import mel_filter_bank

    bank = mel_filter_bank(
        num_frequency_bins=settings.fft_samples // 2 + 1,
        num_mel_filters=settings.num_mel_bins,
        min_frequency=settings.low_hz,
        max_frequency=settings.high_hz,
        sampling_rate=sample_rate_hz,
        norm=settings.mel_norm,
        mel_scale=settings.mel_scale,
        triangularize_in_mel_space=settings.mel_scale == "kaldi",
    )
    is_double = settings.frontend == "kaldi"
    # On the default device, because a model is also built on the meta device.
    return torch.as_tensor(bank if is_double else bank.astype("float32")).T


# ------------------------------------------------------------------------------------ front ends


def _mel_power(waveforms: Tensor, bank: Tensor, window: Tensor, settings: LogMel) -> Tensor:
    """[B, F, S] power of frames that are centred on multiples of hop_samples.

    Both ends are padded by reflection, so S = 1 + samples // hop_samples.
    """
    spectrum = torch.stft(
        waveforms,
        n_fft=settings.fft_samples,
        hop_length=settings.hop_samples,
        win_length=settings.frame_samples,
        window=window,
        center=True,
        pad_mode="reflect",
        return_complex=True,
    )  # [B, samples] -> [B, fft / 2 + 1, S]
    return bank @ spectrum.abs().square()  # [B, fft / 2 + 1, S] -> [B, F, S]


def _decibels(waveforms: Tensor, bank: Tensor, window: Tensor, settings: LogMel) -> Tensor:
    power = _mel_power(waveforms, bank, window, settings)
    return 10 * power.clamp(min=SMALLEST_POWER).log10()


def _whisper(waveforms: Tensor, bank: Tensor, window: Tensor, settings: LogMel) -> Tensor:
    power = _mel_power(waveforms, bank, window, settings)[:, :, :-1]
    mel = power.clamp(min=SMALLEST_POWER).log10()
    return torch.maximum(mel, mel.amax(dim=(1, 2), keepdim=True) - WHISPER_RANGE)


def _kaldi(waveforms: Tensor, bank: Tensor, window: Tensor, settings: LogMel) -> Tensor:
    """[B, F, S] in natural logarithm; frames beyond the last sample that is not zero are 0.

    Models with this front end pad spectrograms with 0, not clips with silence. In float64, because
    quiet bins would otherwise differ by 1e-4.
    """
    clips = waveforms.double()
    frames = clips.unfold(1, settings.frame_samples, settings.hop_samples)  # [B, S, window]
    frames = frames - frames.mean(dim=2, keepdim=True)
    before = functional.pad(frames, (1, 0), mode="replicate")[:, :, :-1]
    frames = (frames - PREEMPHASIS * before) * window
    spectrum = torch.fft.rfft(frames, n=settings.fft_samples)  # [B, S, fft / 2 + 1]
    power = bank @ spectrum.abs().square().transpose(1, 2)  # -> [B, F, S]
    mel = power.clamp(min=SMALLEST_KALDI_POWER).log().float()
    ends = torch.arange(mel.shape[2], device=mel.device) * settings.hop_samples
    ends = ends + settings.frame_samples  # [S]
    samples = torch.arange(1, waveforms.shape[1] + 1, device=mel.device)
    lengths = ((waveforms != 0) * samples).amax(dim=1)  # [B, samples] -> [B]
    return mel.masked_fill((ends > lengths[:, None])[:, None], 0.0)


_LOGARITHMS: dict[str, Callable[[Tensor, Tensor, Tensor, LogMel], Tensor]] = {
    "decibel": _decibels,
    "whisper": _whisper,
    "kaldi": _kaldi,
}
# Values of frames that are padded. Whisper's are never below a clip's maximum by more than 8: its
# clips are padded as waveforms, and frames at their end are cut or filled with its least value.
_SILENCE = {"decibel": -100.0, "whisper": -10.0, "kaldi": 0.0}


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
