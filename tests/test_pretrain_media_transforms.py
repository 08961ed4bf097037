import numpy as np
import pytest
import torch
from PIL import Image

from pretrain.config import AudioTransform, ImageTransform
from pretrain.keyed_random import sample_random
from pretrain.media_transforms import AudioToWaveform, ImageToPixels


def picture(height=60, width=80):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def rng(ordinal=0):
    return sample_random(0, source="a", epoch=0, ordinal=ordinal)


def test_squash_equals_pils_bicubic_resize_to_one_level():
    ours = ImageToPixels(ImageTransform(size=32, resize="squash"))(picture())
    theirs = np.asarray(Image.fromarray(picture()).resize((32, 32), Image.Resampling.BICUBIC))
    assert ours.shape == (3, 32, 32)
    assert ours.dtype == torch.uint8
    difference = ours.permute(1, 2, 0).numpy().astype(int) - theirs
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (32, 32), (20, 31), (1, 300_000)])
def test_shortest_keeps_the_centre_at_the_wanted_size(shape):
    transform = ImageToPixels(ImageTransform(size=32))
    assert transform(np.zeros((*shape, 3), dtype=np.uint8)).shape == (3, 32, 32)
    assert transform.augment(np.zeros((*shape, 3), dtype=np.uint8), rng()).shape == (3, 32, 32)


def test_a_pil_image_gives_the_same_as_its_array():
    transform = ImageToPixels(ImageTransform(size=32))
    assert torch.equal(transform(Image.fromarray(picture())), transform(picture()))


def test_augmentation_is_a_function_of_the_samples_randomness():
    transform = ImageToPixels(ImageTransform(size=32, crop_area=(0.3, 0.9), flip_probability=0.5))
    assert torch.equal(transform.augment(picture(), rng(1)), transform.augment(picture(), rng(1)))
    assert not torch.equal(
        transform.augment(picture(), rng(1)), transform.augment(picture(), rng(2))
    )


def test_flip_probability_one_mirrors():
    whole = {"size": 60, "crop_area": (1, 1), "crop_ratio": (1, 1)}
    square = picture(60, 60)
    kept = ImageToPixels(ImageTransform(**whole)).augment(square, rng())
    mirrored = ImageToPixels(ImageTransform(**whole, flip_probability=1)).augment(square, rng())
    assert torch.equal(mirrored, kept.flip(-1))


def audio_transform(**changes):
    log_mel = {"fft_samples": 16, "low_hz": 0, "high_hz": 50}
    settings = {"sample_rate_hz": 100, "clip_seconds": 0.5, "log_mel": log_mel} | changes
    return AudioToWaveform(AudioTransform(**settings))


def test_a_long_clip_is_cropped_at_its_centre_or_anywhere():
    waveform = np.arange(150, dtype=np.float32)
    transform = audio_transform()
    assert transform(waveform).tolist() == list(range(50, 100))
    starts = {int(transform.augment(waveform, rng(n))[0]) for n in range(60)}
    assert len(starts) > 20
    assert min(starts) >= 0
    assert max(starts) <= 100


def test_a_short_clip_is_repeated_or_followed_by_silence():
    waveform = np.array([1, 2, 3], dtype=np.float32)
    repeated = audio_transform()(waveform)
    assert repeated[:7].tolist() == [1, 2, 3, 1, 2, 3, 1]
    silent = audio_transform(padding="silence")(waveform)
    assert silent[:3].tolist() == [1, 2, 3]
    assert silent[3:].abs().sum() == 0
    assert len(repeated) == len(silent) == 50
