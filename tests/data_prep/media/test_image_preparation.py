import io
import struct

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps
from sklearn.datasets import load_sample_image

from data_prep.config import ImageOptions
from data_prep.media import image_preparation
from data_prep.media.decode import decode_image
from data_prep.media.formats import MediaError
from data_prep.media.image_preparation import prepare_image
from tests.support.bad_media import BAD_MEDIA, picture, png, png_chunk, saved

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Red and blue changed places: as far from sRGB as a profile can be.
SWAPPED = SRGB.replace(b"rXYZ", b"____").replace(b"bXYZ", b"rXYZ").replace(b"____", b"bXYZ")
NAMES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


def prepare(content, **options):
    return prepare_image(content, ImageOptions(**options))


def pixels_of(prepared):
    return decode_image(prepared.content, prepared.extension)


def opened(content):
    return Image.open(io.BytesIO(content))


def psnr(found, expected):
    """Computes the PSNR of two arrays of uint8 in dB."""
    error = np.mean((found.astype(float) - np.asarray(expected)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def gray_profile(gamma):
    """Builds the smallest grey ICC profile: a white point and one exponent."""
    white = b"XYZ \0\0\0\0" + struct.pack(
        ">3i", *(round(each * 65536) for each in (0.9642, 1, 0.8249))
    )
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    tags = struct.pack(">I", 2)
    tags += struct.pack(">4sII4sII", b"wtpt", 156, 20, b"kTRC", 176, len(curve))
    head = struct.pack(
        ">I4sI4s4s4s", 176 + len(curve), bytes(4), 0x02100000, b"mntr", b"GRAY", b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + white[8:]
    return head.ljust(128, b"\0") + tags + white + curve


# ------------------------------------------------------------------------------ scaling


@pytest.mark.parametrize("size", [(1024, 683), (1024, 768), (640, 427), (1536, 1024)])
@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_photographs_are_scaled_as_pillow_would(name, size):
    source = Image.fromarray(load_sample_image(name)).resize(size, Image.Resampling.LANCZOS)
    content = saved(source, "JPEG", quality=95)
    stored = pixels_of(prepare(content, shorter_side=256, format="png"))
    assert stored.shape[0] == 256
    for resampling in (Image.Resampling.LANCZOS, Image.Resampling.BICUBIC):
        expected = opened(content).resize(stored.shape[1::-1], resampling)
        assert psnr(stored, expected) > 35
    again = pixels_of(prepare(content, shorter_side=256))
    assert psnr(again, stored) > 33  # what quality 95 costs


@settings(max_examples=60)
@given(st.integers(16, 500), st.integers(16, 500), st.integers(16, 300), st.booleans())
def test_scaled_pictures_are_not_shifted_and_never_larger(width, height, shorter_side, is_gray):
    rows, columns = np.mgrid[:height, :width]
    waves = 127 + 60 * np.sin(rows * 9 / height) + 60 * np.cos(columns * 9 / width)
    source = Image.fromarray(waves.astype(np.uint8)).convert("L" if is_gray else "RGB")
    content = saved(source, "JPEG", quality=98)
    prepared = prepare(content, shorter_side=shorter_side, format="png", reencode="always")
    stored = pixels_of(prepared)
    assert min(stored.shape[:2]) == min(width, height, shorter_side)
    assert abs(stored.shape[0] / stored.shape[1] - height / width) <= height / width / 16
    expected = source.convert("RGB").resize(stored.shape[1::-1], Image.Resampling.BICUBIC)
    assert psnr(stored, expected) > 35


def test_sizes_before_and_after_are_measured():
    prepared = prepare(picture(size=(90, 60)), shorter_side=20)
    assert (prepared.measures["height"], prepared.measures["width"]) == (20, 30)
    assert (prepared.measures["source_height"], prepared.measures["source_width"]) == (60, 90)
    assert prepared.measures["is_reencoded"] and prepared.extension == "jpg"
    assert simplejpeg.decode_jpeg_header(prepared.content)[3] == "420"


# --------------------------------------------------------------------- kept as they are


@pytest.mark.parametrize("image_format", NAMES)
def test_good_pictures_are_kept_byte_for_byte(image_format):
    content = picture(image_format)
    prepared = prepare(content, shorter_side=40)
    assert prepared.content == content and prepared.extension == NAMES[image_format]
    assert not prepared.measures["is_reencoded"]


def test_grey_progressive_palette_and_srgb_pictures_are_kept():
    source = opened(picture("PNG"))
    for content in (
        saved(source.convert("L"), "JPEG"),
        saved(source, "JPEG", progressive=True),
        saved(source, "JPEG", icc_profile=SRGB),
        saved(source, "JPEG", icc_profile=b"no profile at all"),
        saved(source.convert("P"), "PNG"),
        saved(source.convert("1"), "PNG"),
        saved(source.convert("L"), "PNG", icc_profile=SRGB),
    ):
        assert prepare(content).content == content


def test_pictures_of_cameras_that_hold_several_are_ordinary_jpegs():
    frames = [opened(picture(size=(60, 40))), opened(picture(size=(30, 20)))]
    content = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert opened(content).format == "MPO"
    assert prepare(content).content == content
    assert pixels_of(prepare(content, shorter_side=20)).shape == (20, 30, 3)


def test_the_fingerprint_is_of_the_pixels_that_are_stored(monkeypatch):
    hashed = []
    monkeypatch.setattr(
        image_preparation, "image_fingerprint", lambda pixels: hashed.append(pixels) or {}
    )
    exif = Image.Exif()
    exif[0x0112] = 6
    for content in (picture(), picture("PNG"), picture("WEBP"), picture("GIF"), picture(exif=exif)):
        for reencode in ("if_needed", "always"):
            prepared = prepare(content, format="png", reencode=reencode, shorter_side=32)
            np.testing.assert_array_equal(hashed.pop(), pixels_of(prepared))
    cmyk = saved(Image.new("CMYK", (20, 20), (10, 200, 30, 4)), "JPEG")
    np.testing.assert_array_equal(pixels_of(prepare(cmyk, reencode="never")), hashed.pop())


# -------------------------------------------------------------------- colours, upright


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_baked_in(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = Image.effect_mandelbrot((48, 32), (-2, -1, 1, 1), 50).convert("RGB")
    content = saved(source, image_format, exif=exif)
    prepared = prepare(content, format="png")
    expected = ImageOps.exif_transpose(opened(content))
    np.testing.assert_array_equal(pixels_of(prepared), np.asarray(expected))
    is_kept = orientation == 1 and image_format in NAMES
    assert prepared.measures["is_reencoded"] != is_kept
    assert opened(prepared.content).getexif().get(0x0112, 1) == 1
    small = pixels_of(prepare(content, shorter_side=16, format="png"))
    assert small.shape == ((16, 24, 3) if orientation < 5 else (24, 16, 3))


def test_orientation_is_not_touched_where_nothing_is_reencoded():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = picture(exif=exif)
    prepared = prepare(content, reencode="never")
    assert prepared.content == content
    assert (prepared.measures["height"], prepared.measures["width"]) == (40, 48)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_profiles_are_converted_to_srgb(image_format):
    options = {"lossless": True} if image_format == "WEBP" else {}
    content = saved(opened(picture("PNG")), image_format, icc_profile=SWAPPED, **options)
    stored = pixels_of(prepare(content, format="png"))
    source = opened(content)
    srgb = ImageCms.createProfile("sRGB")
    profile = io.BytesIO(source.info["icc_profile"])
    expected = ImageCms.profileToProfile(source, profile, srgb, outputMode="RGB")
    np.testing.assert_array_equal(stored, np.asarray(expected))
    assert np.abs(stored.astype(int) - np.asarray(source)).max() > 100
    assert "icc_profile" not in opened(prepare(content).content).info


def test_grey_profiles_are_converted_and_those_of_other_channels_left_out():
    gray = opened(picture("PNG")).convert("L")
    profile = gray_profile(1.0)
    stored = pixels_of(prepare(saved(gray, "PNG", icc_profile=profile), format="png"))
    linear = np.asarray(gray) / 255
    # IEC 61966-2-1: the curve of sRGB.
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    is_bright = linear > 0.15  # below, LittleCMS has too few steps between the 8 bits of input
    np.testing.assert_allclose(stored[:, :, 0][is_bright], 255 * curve[is_bright], atol=1.5)
    color = picture("PNG", icc_profile=profile)
    assert prepare(color).content == color


def test_cmyk_becomes_rgb():
    source = opened(picture("PNG")).convert("CMYK")
    as_ycck = simplejpeg.encode_jpeg(np.array(source), colorspace="CMYK", quality=95)
    for content in (saved(source, "JPEG"), saved(source, "TIFF"), as_ycck):
        prepared = prepare(content, format="png")
        assert prepared.measures["is_reencoded"]
        expected = opened(content).convert("RGB")
        np.testing.assert_allclose(pixels_of(prepared), np.asarray(expected), atol=1)
        small = pixels_of(prepare(content, shorter_side=16, format="png"))
        assert psnr(small, expected.resize((19, 16))) > 35


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF", "GIF"])
def test_transparency_is_laid_on_white(image_format):
    source = opened(picture("PNG")).convert("RGBA")
    alpha = np.zeros((40, 48), np.uint8)
    alpha[:, 24:] = 255
    source.putalpha(Image.fromarray(alpha))
    options = {"lossless": True} if image_format == "WEBP" else {}
    stored = pixels_of(prepare(saved(source, image_format, **options), format="png"))
    assert (stored[:, :24] == 255).all()
    atol = 60 if image_format == "GIF" else 0  # its palette
    np.testing.assert_allclose(stored[:, 24:], np.asarray(source)[:, 24:, :3], atol=atol)


def test_grey_and_palette_pictures_with_transparency_are_laid_on_white():
    gray = Image.new("LA", (20, 20), (80, 0))
    palette = Image.new("RGB", (20, 20), "red").convert("P")
    for content in (
        saved(gray, "PNG"),
        saved(Image.new("L", (20, 20), 7), "PNG", transparency=7),
        saved(palette, "PNG", transparency=palette.getpixel((0, 0))),
    ):
        assert (pixels_of(prepare(content)) == 255).all()


def test_sixteen_bits_keep_their_upper_eight():
    values = np.linspace(0, 65_535, 400).astype(np.uint16).reshape(20, 20)
    for image_format in ("PNG", "TIFF"):
        prepared = prepare(saved(Image.fromarray(values), image_format), format="png")
        assert prepared.measures["is_reencoded"]
        np.testing.assert_array_equal(pixels_of(prepared)[:, :, 1], values >> 8)


# ---------------------------------------------------------------------- limits, filters


@pytest.mark.parametrize("name", ["apng", "webp_animated", "gif_animated", "tiff_of_several_pages"])
def test_the_first_frame_is_kept_if_asked(name):
    content = BAD_MEDIA[name][0]()
    prepared = prepare(content, first_frame=True, format="png")
    expected = opened(content).convert("RGB")
    np.testing.assert_allclose(pixels_of(prepared), np.asarray(expected), atol=0)
    assert prepared.measures["is_reencoded"]
    assert not getattr(opened(prepared.content), "is_animated", False)


def test_pixels_are_counted_before_decoding(monkeypatch):
    for image_format in (*NAMES, "GIF", "BMP", "TIFF", "AVIF"):
        content = picture(image_format, size=(48, 40))
        assert prepare(content, max_pixels=48 * 40)
        with pytest.raises(MediaError, match="48 x 40 pixels; expected at most 1919"):
            prepare(content, max_pixels=1919)
    monkeypatch.setattr(image_preparation, "MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match="at most 1000"):
        prepare(picture())
    assert prepare(picture(), shorter_side=20)


def test_a_side_that_the_format_cannot_hold_is_refused():
    content = saved(Image.new("L", (16_384, 1)), "PNG")
    assert prepare(content, reencode="always")
    with pytest.raises(MediaError, match="at most 16383") as caught:
        prepare(content, reencode="always", format="webp")
    assert caught.value.reason == "too_long_side"


def test_filters_look_at_the_source():
    content = picture(size=(90, 40))
    found = [
        prepare(content, **options).found
        for options in (
            {"min_side": 40, "max_aspect_ratio": 2.25, "shorter_side": 16},
            {"min_side": 41, "shorter_side": 16},
            {"min_side": 41, "max_aspect_ratio": 2.24},
        )
    ]
    assert found == [(), ("image_too_small",), ("image_too_small", "image_aspect_ratio")]


def test_texts_of_ordinary_size_do_no_harm():
    text = png_chunk(b"tEXt", b"prompt\0" + b"a long text " * 200_000)
    rows = b"\x78\x9c" + b"\x63\x60\x00\x00\x00\x02\x00\x01"  # zlib: two zeros
    content = png(1, 1, rows, extra=text)
    assert prepare(content).content == content
