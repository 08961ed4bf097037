import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageCms

from data_prep.config import FILTER_REASONS, AudioOptions, ImageOptions
from data_prep.media.formats import MediaError
from data_prep.media.preparation import prepare_media
from data_prep.shards.columns import MEASURES
from data_prep.shards.sample import MEDIA_EXTENSIONS
from tests.support.bad_media import AUDIO_FILTERS, BAD_MEDIA, IMAGE_FILTERS, picture, sound

CPU_SECONDS = 10  # of work that takes milliseconds; the load of the machine does not count


def prepare(content, kind, image=None, audio=None):
    return prepare_media(
        content, kind=kind, image=ImageOptions(**image or {}), audio=AudioOptions(**audio or {})
    )


@pytest.mark.parametrize("name", BAD_MEDIA)
def test_bad_media_end_in_their_reason_and_soon(name):
    make, kind, reason = BAD_MEDIA[name]
    content, start = make(), time.process_time()
    if reason in FILTER_REASONS:
        (prepared,) = prepare(content, kind, IMAGE_FILTERS, AUDIO_FILTERS)
        assert prepared.found == (reason,)
    else:
        with pytest.raises(MediaError) as caught:
            prepare(content, kind, IMAGE_FILTERS, AUDIO_FILTERS)
        assert caught.value.reason == reason, caught.value
    assert time.process_time() - start < CPU_SECONDS


GOOD_MEDIA = [
    *[(picture(name), "image") for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")],
    *[(sound(name), "audio") for name in ("WAV", "RF64", "FLAC", "OGG", "MP3", "AIFF")],
    (sound("OGG", subtype="OPUS"), "audio"),
]


@pytest.mark.parametrize(("content", "kind"), GOOD_MEDIA)
@pytest.mark.parametrize("reencode", ["if_needed", "always"])
def test_good_media_fill_every_column_and_always_give_the_same_bytes(content, kind, reencode):
    options = {"reencode": reencode}
    (prepared,) = prepare(content, kind, options, options)
    assert list(prepared.measures) == [name for name, _ in MEASURES[kind]]
    assert prepared.extension in MEDIA_EXTENSIONS[kind]
    assert prepared.found == ()
    assert prepared.measures["is_reencoded"] or prepared.content == content
    assert prepare(content, kind, options, options) == [prepared]


def test_stored_formats_pass_through_and_others_are_refused_where_nothing_is_reencoded():
    for content, kind in GOOD_MEDIA:
        never = {"reencode": "never"}
        (prepared,) = prepare(content, kind)
        if prepared.measures["is_reencoded"]:
            with pytest.raises(MediaError, match="must be re-encoded") as caught:
                prepare(content, kind, never, never)
            assert caught.value.reason == "format_not_stored"
        else:
            assert prepare(content, kind, never, never) == [prepared]


@pytest.mark.parametrize("section", [{"image": {"shorter_side": 64}}, {"audio": {"mono": True}}])
def test_never_reencoding_contradicts_what_needs_it(section):
    ((kind, options),) = section.items()
    with pytest.raises(ValueError, match="reencode=never"):
        prepare(b"", kind, **{kind: {"reencode": "never", **options}})


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
NOISE = np.random.default_rng(0).uniform(-0.3, 0.3, (1500, 2))
FUZZED = [
    *GOOD_MEDIA,
    *[(BAD_MEDIA[name][0](), "image") for name in ("apng", "webp_animated", "gif_animated")],
    (picture(progressive=True, icc_profile=SRGB), "image"),
    (picture("PNG", icc_profile=SRGB), "image"),
    (picture("WEBP", lossless=True, icc_profile=SRGB), "image"),
    (picture("TIFF", compression="tiff_lzw"), "image"),
    (picture("TIFF", compression="tiff_adobe_deflate", icc_profile=SRGB), "image"),
    (sound(samples=NOISE, subtype="FLOAT"), "audio"),
    (sound("WAVEX", samples=NOISE, subtype="PCM_24"), "audio"),
    (sound("FLAC", samples=NOISE, subtype="PCM_24"), "audio"),
    (sound("MP3", samples=NOISE), "audio"),
]


@settings(max_examples=600)
@given(st.data())
def test_damage_never_raises_anything_but_media_errors_and_takes_no_time(data):
    content, kind = data.draw(st.sampled_from(FUZZED))
    content = bytearray(content)
    for _ in range(data.draw(st.integers(0, 6))):
        # Headers are short compared with their content, and damage there has the largest effect.
        place = data.draw(st.one_of(st.integers(0, 200), st.integers(0, len(content) - 1)))
        content[min(place, len(content) - 1)] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    image = {"first_frame": True, "shorter_side": 16, "max_pixels": 1_000_000}
    audio = {"sample_rate_hz": 4000, "mono": True, "clip_seconds": 0.1, "max_seconds": 60.0}
    start = time.process_time()
    try:
        with np.errstate(over="ignore"):
            prepare(bytes(content), kind, image, audio)
    except MediaError as error:
        assert error.reason
    assert time.process_time() - start < CPU_SECONDS
