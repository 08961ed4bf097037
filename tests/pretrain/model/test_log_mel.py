import numpy as np
import pytest
import torch
from transformers import ClapFeatureExtractor

from pretrain.model.log_mel import LogMelSpectrogram, fill_masks
from pretrain.settings.transforms import AudioTransform


def spectrogram(waveform, **log_mel):
    config = AudioTransform(
        sample_rate_hz=48000, log_mel={"mean_db": 0, "std_db": 1, "low_hz": 0} | log_mel
    )
    return LogMelSpectrogram(config)(torch.as_tensor(waveform, dtype=torch.float32)[None])[0, 0]


def noise(samples=480_000):
    return 0.1 * np.random.default_rng(0).standard_normal(samples)


@pytest.mark.parametrize(
    ("truncation", "mel_scale", "mel_norm"),
    [("rand_trunc", "slaney", "slaney"), ("fusion", "htk", None)],
)
def test_decibels_equal_hugging_faces_clap_front_end(truncation, mel_scale, mel_norm):
    theirs = ClapFeatureExtractor(truncation=truncation)(
        noise(), sampling_rate=48000, return_tensors="pt"
    )["input_features"][0, 0]  # [S, F]
    ours = spectrogram(noise(), mel_scale=mel_scale, mel_norm=mel_norm)
    assert ours.shape == (64, 1001)
    assert (ours.T - theirs).abs().max() < 1e-3


def test_a_sine_is_loudest_in_the_bin_of_its_frequency():
    times = np.arange(48000) / 48000
    mel = spectrogram(np.sin(2 * np.pi * 1000 * times), mel_scale="htk", mel_norm=None)
    # HTK: mel(f) = 2595 log10(1 + f / 700); 64 triangles between 0 and 14 kHz have 65 steps.
    to_mel = lambda hertz: 2595 * np.log10(1 + hertz / 700)  # noqa: E731
    expected_bin = round(to_mel(1000) / to_mel(14000) * 65) - 1
    assert mel[:, 50].argmax().item() == expected_bin


def test_silence_is_the_floor_and_standardisation_is_applied():
    silence = np.zeros(48000)
    assert spectrogram(silence).unique().tolist() == [-100.0]
    assert spectrogram(silence, mean_db=-40, std_db=20).unique().tolist() == [-3.0]


def test_masks_hold_the_mean_of_their_own_picture():
    generator = torch.Generator().manual_seed(0)
    mel = torch.randn(3, 12, 40, generator=generator)
    masks = torch.tensor(
        [
            [[0, 3], [10, 2], [35, 5]],
            [[4, 0], [5, 1], [0, 0]],
            [[2, 4], [3, 4], [7, 30]],
        ],
        dtype=torch.int32,
    )
    filled = fill_masks(mel, masks[:, :2], time_masks=masks[:, 2:])
    expected = mel.clone()
    for row, (first, second, third) in enumerate(masks.tolist()):
        for start, width in (first, second):
            expected[row, start : start + width] = mel[row].mean()
        expected[row, :, third[0] : third[0] + third[1]] = mel[row].mean()
    torch.testing.assert_close(filled, expected)


def test_masks_are_laid_on_the_standardised_picture_only_when_given():
    config = AudioTransform(sample_rate_hz=48000, spec_augment={"num_time_stripes": 1})
    front_end = LogMelSpectrogram(config)
    waveforms = torch.as_tensor(noise(48000), dtype=torch.float32).repeat(2, 1)
    plain = front_end(waveforms)
    assert torch.equal(front_end(waveforms, torch.zeros(2, 0, 2, dtype=torch.int32)), plain)
    none, some = [[0, 0], [0, 0], [0, 0]], [[60, 4], [0, 1], [90, 11]]
    masked = front_end(waveforms, torch.tensor([none, some], dtype=torch.int32))
    assert masked.shape == plain.shape == (2, 1, 64, 101)
    assert torch.equal(masked[0], plain[0])
    is_changed = masked[1, 0] != plain[1, 0]
    assert is_changed[60:].all()
    assert is_changed[0].all()
    assert is_changed[:, 90:].all()
    assert not is_changed[1:60, :90].any()
    assert masked[1, 0][is_changed].unique().tolist() == [plain[1].mean().item()]
