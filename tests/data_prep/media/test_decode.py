import io
import pickle

import numpy as np
import pytest
import soundfile
from PIL import Image

from data_prep.media import decode
from data_prep.media.audio_file import audio_seconds
from data_prep.media.decode import (
    FormatMismatchError,
    MediaError,
    decode_audio,
    decode_image,
    image_size,
)
from tests.support.bad_media import BAD_MEDIA, picture, sound


@pytest.mark.parametrize(("image_format", "extension"), [("PNG", "png"), ("JPEG", "jpeg")])
def test_images_decode_to_rgb_of_their_size(image_format, extension):
    content = picture(image_format)
    assert decode_image(content, extension).shape == (40, 48, 3)
    assert image_size(content) == (40, 48)
    with pytest.raises(MediaError):
        decode_image(content[:-60], extension)


def test_transparency_is_laid_on_white():
    sink = io.BytesIO()
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(sink, "PNG")
    assert (decode_image(sink.getvalue(), "png") == 255).all()


def test_other_formats_than_the_extension_says_are_refused():
    with pytest.raises(FormatMismatchError, match="expected jpg bytes, found png"):
        decode_image(picture("PNG"), "jpg")
    with pytest.raises(FormatMismatchError, match="expected wav bytes, found FLAC"):
        decode_audio(sound("FLAC"), sample_rate_hz=None, extension="wav")
    with pytest.raises(MediaError):  # a decoder of Pillow that is not among ours
        decode_image(picture("GIF"), "png")


def test_huge_pictures_are_refused_before_decoding(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 100)
    for image_format, extension in (("PNG", "png"), ("JPEG", "jpg")):
        with pytest.raises(MediaError, match="48 x 40 pixels; expected at most 100"):
            decode_image(picture(image_format), extension)


def test_audio_is_averaged_over_channels_and_resampled():
    sink = io.BytesIO()
    stereo = np.stack([np.full(800, 0.5), np.zeros(800)], axis=1)
    soundfile.write(sink, stereo, 8000, format="WAV")
    assert audio_seconds(sink.getvalue()) == (0.1, 8000)
    np.testing.assert_allclose(decode_audio(sink.getvalue(), sample_rate_hz=None), 0.25, atol=1e-4)
    assert decode_audio(sink.getvalue(), sample_rate_hz=16_000).shape == (1600,)


@pytest.mark.parametrize("extension", ["flac", "ogg"])
def test_a_flipped_bit_in_a_checked_format_is_found(extension):
    content = bytearray(sound(extension.upper()))
    content[len(content) * 3 // 4] ^= 8
    with pytest.raises(MediaError):
        decode_audio(bytes(content), sample_rate_hz=None)


@pytest.mark.parametrize("extension", ["wav", "ogg", "mp3", "aiff"])
def test_a_cut_clip_is_not_read_as_a_shorter_one(extension):
    content = sound(extension.upper())
    for end in (len(content) - 2, len(content) // 2):
        with pytest.raises(MediaError, match="truncated"):
            decode_audio(content[:end], sample_rate_hz=None)


def test_errors_name_their_reason_also_after_they_crossed_to_another_process():
    for name in ("wav_of_0_hz", "wav_of_no_samples", "wav_with_nan", "flac_claiming_months"):
        make, _, reason = BAD_MEDIA[name]
        with pytest.raises(MediaError) as caught:
            decode_audio(make(), sample_rate_hz=None)
        assert pickle.loads(pickle.dumps(caught.value)).reason == reason
    assert MediaError("damaged").reason == "undecodable"
    assert pickle.loads(pickle.dumps(FormatMismatchError("png"))).reason == "wrong_extension"
