import time

import pytest
from bad_media import AUDIO_FILTERS, BAD_MEDIA, IMAGE_FILTERS, picture, sound

from data_prep.config import AudioOptions, ImageOptions
from data_prep.media_format import MediaError
from data_prep.media_preparation import prepare_media
from data_prep.pair import FILTER_REASONS
from data_prep.shard_columns import MEASURES
from data_prep.shard_format import MEDIA_EXTENSIONS


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
    assert time.process_time() - start < 0.5


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
            with pytest.raises(MediaError, match="stored only re-encoded") as caught:
                prepare(content, kind, never, never)
            assert caught.value.reason == "format_not_stored"
        else:
            assert prepare(content, kind, never, never) == [prepared]


@pytest.mark.parametrize("section", [{"image": {"shorter_side": 64}}, {"audio": {"mono": True}}])
def test_never_reencoding_contradicts_what_needs_it(section):
    ((kind, options),) = section.items()
    with pytest.raises(ValueError, match="reencode=never"):
        prepare(b"", kind, **{kind: {"reencode": "never", **options}})
