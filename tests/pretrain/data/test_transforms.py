import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as colors

from data_prep.media import decode
from data_prep.media.decode import MediaError, decode_image
from pretrain.data.transforms import AudioToWaveform, ImageToPixels, _with_contrast
from pretrain.sampling.keyed_random import sample_random
from pretrain.settings.transforms import AudioTransform, ImageTransform
from tests.support.bad_media import saved, sound
from tests.support.training_rows import training_row

WHOLE = {"crop_area": (1, 1), "crop_ratio": (1, 1)}  # of a square picture


def picture(height=60, width=80):
    """Draws smooth blobs with fine edges between them, as photographs have."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = np.mgrid[:height, :width] / 32
    ripples = 12 * np.sin(rows * 2.1 + columns) * np.sin(columns * 1.7)
    return np.clip(pixels + ripples[..., None], 0, 255).astype(np.uint8)


def jpeg(height, width):
    return saved(Image.fromarray(picture(height, width)), "JPEG", quality=92)


def rng(ordinal=0):
    return sample_random(0, source="a", epoch=0, ordinal=ordinal, view="image")


def image_transform(**changes):
    return ImageToPixels(ImageTransform(**({"size": 32} | changes)))


def trained(transform, content, ordinal=0, extension="jpg"):
    return training_row(transform, content, extension, rng(ordinal))[0]


def psnr(ours, theirs):
    error = (np.asarray(ours).astype(float) - np.asarray(theirs).astype(float)) ** 2
    return 10 * np.log10(255**2 / max(error.mean(), 1e-9))


# ------------------------------------------------------------------------- images, evaluation


def test_squash_equals_pils_bicubic_resize_to_one_level():
    ours = image_transform(resize="squash")(picture())
    theirs = np.asarray(Image.fromarray(picture()).resize((32, 32), Image.Resampling.BICUBIC))
    assert ours.shape == (3, 32, 32)
    assert ours.dtype == torch.uint8
    difference = ours.permute(1, 2, 0).numpy().astype(int) - theirs
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("shape", [(60, 80), (80, 60), (32, 32), (20, 31), (1, 300_000)])
def test_every_shape_of_picture_gives_the_wanted_size(shape):
    pixels = np.zeros((*shape, 3), dtype=np.uint8)
    assert image_transform()(pixels).shape == (3, 32, 32)
    example = trained(image_transform(), saved(Image.fromarray(pixels), "PNG"), extension="png")
    assert example.shape == (32, 32, 3)


def test_a_pil_image_gives_the_same_as_its_array():
    transform = image_transform()
    assert torch.equal(transform(Image.fromarray(picture())), transform(picture()))


# --------------------------------------------------------------------------- images, training


def cropped_by_pillow(content, transform, ordinal):
    image = Image.open(io.BytesIO(content)).convert("RGB")
    top, left, height, width = transform._random_crop(image.height, image.width, rng(ordinal))
    image = image.crop((left, top, left + width, top + height))
    size = transform.config.size
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(resized), min(height, width) / size


@pytest.mark.parametrize(
    ("shape", "crop_area"),
    [((256, 256), (0.9, 1)), ((384, 512), (0.2, 1)), ((512, 400), (0.9, 1)), ((90, 70), (0.5, 1))],
)
def test_a_training_picture_equals_pillows_crop_and_bicubic_resize(shape, crop_area):
    transform, content = image_transform(size=224, crop_area=crop_area), jpeg(*shape)
    for ordinal in range(6):
        ours = trained(transform, content, ordinal).numpy()
        theirs, factor = cropped_by_pillow(content, transform, ordinal)
        assert psnr(ours, theirs) >= 60
        difference = np.abs(ours.astype(int) - theirs)
        # Below a factor of two, two roundings may meet in a pixel.
        assert difference.max() <= (1 if factor >= 2 else 2)
        assert (difference > 1).mean() < 1e-4


def test_a_row_has_the_shape_type_and_memory_order_that_the_batch_expects():
    transform = image_transform(flip_probability=1, grey_probability=1, color_jitter={})
    row, masks = training_row(transform, jpeg(60, 80), "jpg", rng())
    assert row.shape == transform.row_shape == (32, 32, 3)
    assert row.dtype == transform.row_dtype == torch.uint8
    assert row.is_contiguous()
    assert (masks, transform.num_masks) == ([], 0)


def test_a_training_picture_is_a_function_of_its_bytes_and_randomness_in_any_thread():
    everything = {"flip_probability": 0.5, "grey_probability": 0.5, "color_jitter": {}}
    transform = image_transform(crop_area=(0.3, 0.9), **everything)
    content = jpeg(90, 70)
    alone = [trained(transform, content, ordinal) for ordinal in range(24)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda n: trained(transform, content, n), range(24)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
    assert len({tuple(values.flatten().tolist()) for values in alone}) == 24


def test_the_crop_and_its_place_reach_every_part_of_the_picture():
    rows, columns = np.mgrid[:100, :100]
    pixels = np.stack([rows, columns, rows], axis=-1).astype(np.uint8)
    content = saved(Image.fromarray(pixels), "PNG")
    transform = image_transform(crop_area=(0.1, 0.2), crop_ratio=(1, 1))
    examples = [trained(transform, content, n, "png") for n in range(60)]
    corners = [values[0, 0, :2].tolist() for values in examples]
    assert min(row for row, _ in corners) < 10
    assert max(row for row, _ in corners) > 50
    assert len({row - column for row, column in corners}) > 20


def test_what_is_turned_on_does_not_change_the_other_draws():
    content = jpeg(90, 70)
    plain = image_transform()
    flipped, grey = image_transform(flip_probability=1), image_transform(grey_probability=1)
    still = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    jittered = image_transform(color_jitter=still, flip_probability=0.5)
    some_flipped = image_transform(flip_probability=0.5)
    for ordinal in range(8):
        expected = trained(plain, content, ordinal)
        assert torch.equal(trained(flipped, content, ordinal), expected.flip(1))
        without_color = colors.rgb_to_grayscale(expected.permute(2, 0, 1), 3).permute(1, 2, 0)
        assert torch.equal(trained(grey, content, ordinal), without_color)
        expected = trained(some_flipped, content, ordinal)
        assert (trained(jittered, content, ordinal).int() - expected).abs().max() <= 1


def test_colour_jitter_is_torchvisions_in_the_order_of_the_config():
    content = saved(Image.fromarray(picture(32, 32)), "PNG")
    strengths = {"brightness": 0.4, "contrast": 0.3, "saturation": 0.5, "hue": 0.1}
    jitter = {"probability": 1} | strengths
    transform = image_transform(**WHOLE, color_jitter=jitter)
    for ordinal in range(4):
        draws = rng(ordinal)
        numbers = [draws.random() for _ in range(11)][7:]  # after 4 + 2 and the probability
        brightness, contrast, saturation, hue = (
            strength * (2 * number - 1)
            for strength, number in zip(strengths.values(), numbers, strict=True)
        )
        expected = torch.from_numpy(picture(32, 32)).permute(2, 0, 1)
        expected = colors.adjust_brightness(expected, 1 + brightness)
        expected = colors.adjust_contrast(expected, 1 + contrast)
        expected = colors.adjust_saturation(expected, 1 + saturation)
        expected = colors.adjust_hue(expected, hue).permute(1, 2, 0)
        ours = trained(transform, content, ordinal, "png")
        assert (ours.int() - expected).abs().float().mean() < 0.01
    never = image_transform(**WHOLE, color_jitter=jitter | {"probability": 0})
    assert trained(never, content, 0, "png").numpy().tobytes() == picture(32, 32).tobytes()


def test_contrast_does_not_depend_on_the_number_of_threads():
    pixels = torch.from_numpy(picture(480, 640)).permute(2, 0, 1)
    num_threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(_with_contrast(pixels, 1.37))
    finally:
        torch.set_num_threads(num_threads)
    assert all(torch.equal(result, results[0]) for result in results)
    assert (results[0].int() - colors.adjust_contrast(pixels, 1.37)).abs().max() <= 1


# ---------------------------------------------------------------------- scaled decoding of JPEGs


@pytest.mark.parametrize(
    ("shape", "denominator"), [((301, 403), 4), ((150, 150), 2), ((700, 650), 8), ((100, 63), 1)]
)
def test_a_scaled_jpeg_is_decoded_as_small_as_the_crop_allows(shape, denominator, monkeypatch):
    used = []

    def decoding(content, extension, *, denominator=1, memory=None):
        used.append(denominator)
        return decode_image(content, extension, denominator=denominator, memory=memory)

    monkeypatch.setattr("pretrain.data.transforms.decode_image", decoding)
    content = jpeg(*shape)
    scaled = image_transform(scaled_decoding=True, crop_area=(0.5, 0.5), crop_ratio=(1, 1))
    whole = image_transform(crop_area=(0.5, 0.5), crop_ratio=(1, 1))
    for ordinal in range(5):
        assert psnr(trained(scaled, content, ordinal), trained(whole, content, ordinal)) > 25
    assert used == [denominator, 1] * 5


def test_a_scaled_crop_has_at_least_the_wanted_size_and_lies_inside():
    transform = image_transform(scaled_decoding=True, crop_area=(0.1, 1), crop_ratio=(0.5, 2))
    for shape in ((129, 257), (333, 71), (90, 500)):
        content = jpeg(*shape)
        for ordinal in range(40):
            full = transform._random_crop(*shape, rng(ordinal))
            part = transform._cropped(content, "jpg", rng(ordinal))
            if transform._denominator(*full[2:]) > 1:
                assert min(part.shape[:2]) >= 32
            assert min(part.shape[:2]) >= 1


def test_scaled_decoding_leaves_other_formats_and_cmyk_as_they_are():
    for image, image_format in (
        (Image.fromarray(picture(200, 200)), "PNG"),
        (Image.fromarray(picture(200, 200)).convert("CMYK"), "JPEG"),
    ):
        content = saved(image, image_format)
        extension = "png" if image_format == "PNG" else "jpg"
        scaled = trained(image_transform(scaled_decoding=True), content, 1, extension)
        assert torch.equal(scaled, trained(image_transform(), content, 1, extension))


@pytest.mark.parametrize("scaled_decoding", [False, True])
def test_bad_pictures_are_refused_before_and_while_they_are_decoded(scaled_decoding, monkeypatch):
    transform = image_transform(scaled_decoding=scaled_decoding)
    content = jpeg(300, 300)
    for bad, message in (
        (content[:-200], "unreadable JPEG"),
        (b"\xff\xd8\xff nothing", "unreadable JPEG"),
        (saved(Image.fromarray(picture()), "PNG"), "expected jpg bytes, found png"),
    ):
        with pytest.raises(MediaError, match=message):
            trained(transform, bad)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match="300 x 300 pixels; expected at most 1000"):
        trained(transform, content)


# ---------------------------------------------------------------------------------------- audio


def audio_transform(**changes):
    log_mel = {"fft_samples": 16, "low_hz": 0, "high_hz": 50, "hop_samples": 10}
    log_mel |= {"num_mel_bins": 12}
    settings = {"sample_rate_hz": 2000, "clip_seconds": 0.5, "log_mel": log_mel} | changes
    return AudioToWaveform(AudioTransform(**settings))


def wav(waveform, rate=2000):
    sink = io.BytesIO()
    soundfile.write(sink, waveform, rate, format="WAV", subtype="FLOAT")
    return sink.getvalue()


def test_a_long_clip_is_cropped_at_its_centre_or_anywhere():
    waveform = np.arange(3000, dtype=np.float32) / 4096
    transform = audio_transform()
    assert (transform(waveform) * 4096).tolist() == list(range(1000, 2000))
    content, starts = wav(waveform), set()
    for ordinal in range(200):
        clip = trained(transform, content, ordinal, "wav") * 4096
        start = int(clip[0])
        assert clip.tolist() == list(range(start, start + 1000))
        starts.add(start)
    assert len(starts) > 180
    assert min(starts) < 50
    assert max(starts) > 1950


def test_a_short_clip_is_repeated_or_followed_by_silence():
    waveform = np.array([1, 2, 3], dtype=np.float32) / 4
    for repeated in (audio_transform()(waveform), trained(audio_transform(), wav(waveform))):
        assert (repeated[:7] * 4).tolist() == [1, 2, 3, 1, 2, 3, 1]
        assert repeated.shape == (1000,)
    silent = audio_transform(padding="silence")(waveform)
    assert (silent[:3] * 4).tolist() == [1, 2, 3]
    assert silent[3:].abs().sum() == 0
    assert len(silent) == 1000


def test_bad_clips_are_refused_in_training():
    for bad, message in (
        (sound("WAV", samples=np.full(4000, np.nan), subtype="FLOAT"), "NaN or infinity"),
        (sound("FLAC")[:-3000], "unreadable audio"),
        (b"nothing", "unreadable audio"),
    ):
        with pytest.raises(MediaError, match=message):
            trained(audio_transform(), bad, extension="flac")


def test_masks_follow_the_config_and_fit_the_picture():
    spec = {"num_mel_stripes": 2, "mel_bins": 5, "num_time_stripes": 3, "frames": 20}
    transform = audio_transform(spec_augment=spec)
    content = wav(np.zeros(3000, dtype=np.float32))
    drawn = [training_row(transform, content, "wav", rng(n))[1] for n in range(150)]
    assert all(len(masks) == transform.num_masks == 5 for masks in drawn)
    # 12 mel bins; 1 + 1000 // 10 frames.
    for indices, length, widest in ((slice(0, 2), 12, 5), (slice(2, 5), 101, 20)):
        chosen = [mask for masks in drawn for mask in masks[indices]]
        assert {width for _, width in chosen} == set(range(widest + 1))
        assert min(start for start, _ in chosen) == 0
        assert max(start + width for start, width in chosen) == length
    assert drawn[0] == training_row(transform, content, "wav", rng(0))[1]


def test_masks_do_not_change_the_part_of_the_clip():
    content = wav(np.arange(3000, dtype=np.float32) / 4096)
    masked = trained(audio_transform(spec_augment={"mel_bins": 4}), content, 3)
    assert torch.equal(masked, trained(audio_transform(), content, 3))


@pytest.mark.parametrize(("key", "width"), [("mel_bins", 13), ("frames", 102)])
def test_masks_wider_than_the_picture_are_refused(key, width):
    with pytest.raises(ValueError, match=f"spec_augment.{key}={width} is wider than"):
        audio_transform(spec_augment={"mel_bins": 4, key: width})


@pytest.mark.parametrize("height, width", [(50, 70), (20, 90), (24, 24), (24, 60)])
def test_a_picture_is_resized_into_its_row_as_torch_resizes_it(height, width):
    part = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    rows = torch.zeros(3, 24, 24, 3, dtype=torch.uint8)
    transform = ImageToPixels(ImageTransform(size=24))
    assert transform.write_row(part, rng(), rows[1]) == []
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(part).permute(2, 0, 1)[None], (24, 24), mode="bicubic", antialias=True
    )
    assert torch.equal(rows[1], expected[0].permute(1, 2, 0))
    assert not rows[[0, 2]].any()
