import io
import struct

import numpy as np
import pytest
import scipy.signal
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.config import AudioOptions
from data_prep.media import audio_preparation, decode, mp3_frames
from data_prep.media.audio_preparation import prepare_audio
from data_prep.media.decode import decode_audio
from data_prep.media.formats import MediaError, audio_format
from tests.support.bad_media import sound

RATE = 8000


def prepare(content, **options):
    return prepare_audio(content, AudioOptions(**options))


def stored(prepared, dtype="int16"):
    """Reads a stored clip: samples [n, channels], rate, and soundfile's (format, subtype)."""
    with soundfile.SoundFile(io.BytesIO(prepared.content)) as file:
        return file.read(dtype=dtype, always_2d=True), file.samplerate, (file.format, file.subtype)


def tone(num_samples, *, rate=RATE, hz=440.0, peak=0.5):
    return peak * np.sin(2 * np.pi * hz * np.arange(num_samples) / rate)


def noise(num_samples, channels=1):
    """Returns int16 [num_samples, channels]."""
    rng = np.random.default_rng(0)
    return rng.integers(-32_768, 32_768, (num_samples, channels)).astype(np.int16)


# --------------------------------------------------------------------- kept as they are


@pytest.mark.parametrize(
    ("sound_format", "subtype"),
    [
        ("WAV", "PCM_24"),
        ("WAV", "FLOAT"),
        ("WAV", "PCM_U8"),
        ("FLAC", "PCM_24"),
        ("OGG", "OPUS"),
    ],
)
def test_clips_of_any_depth_are_kept_byte_for_byte(sound_format, subtype):
    content = sound(sound_format, subtype=subtype)
    (prepared,) = prepare(
        content, sample_rate_hz=RATE, mono=True, clip_seconds=0.5, max_seconds=1, peak_dbfs=None
    )
    assert prepared.content == content and prepared.extension == audio_format(content)
    assert prepared.measures["seconds"] == prepared.measures["source_seconds"] == 0.5
    assert prepared.measures["sample_rate_hz"] == RATE and prepared.measures["channels"] == 1
    assert prepared.measures["start_seconds"] == 0 and not prepared.measures["is_reencoded"]


def test_gsm_which_cannot_seek_is_read_to_its_end():
    content = sound(subtype="GSM610")
    (prepared,) = prepare(content)
    assert prepared.content == content
    assert prepared.measures["seconds"] == soundfile.info(io.BytesIO(content)).duration


def test_floats_beyond_full_scale_are_kept_where_nothing_is_reencoded():
    content = sound(samples=tone(800, peak=3.0), subtype="FLOAT")
    (prepared,) = prepare(content)
    assert prepared.content == content


@pytest.mark.parametrize(
    "options",
    [
        {"reencode": "always"},
        {"sample_rate_hz": 16_000},
        {"mono": True},
        {"clip_seconds": 0.4},
        {"trim_silence_dbfs": -20.0},
        {"peak_dbfs": -3.0},
    ],
)
def test_whatever_is_not_as_asked_is_reencoded_to_flac_of_16_bits(options):
    samples = np.stack([tone(4000), tone(4000)], axis=1)
    samples[:100] = 0
    (prepared,) = prepare(sound(samples=samples, subtype="PCM_24"), **options)
    assert prepared.measures["is_reencoded"] and prepared.extension == "flac"
    found, rate, kind = stored(prepared)
    assert kind == ("FLAC", "PCM_16")
    assert prepared.measures["sample_rate_hz"] == rate == options.get("sample_rate_hz", RATE)
    assert prepared.measures["channels"] == found.shape[1] == 1 + ("mono" not in options)
    assert prepared.measures["seconds"] == len(found) / rate
    again = prepare(prepared.content, **options | {"reencode": "if_needed"})
    assert [each.content for each in again] == [prepared.content]


# --------------------------------------------------------------------------- re-encoding


def test_sixteen_bits_stay_bit_by_bit():
    samples = noise(4001, channels=2)
    samples[:2] = [[-32_768, 32_767], [32_767, -32_768]]
    (prepared,) = prepare(sound(samples=samples), reencode="always")
    np.testing.assert_array_equal(stored(prepared)[0], samples)


def test_the_fingerprint_is_of_the_sound_that_is_stored(monkeypatch):
    heard = []
    monkeypatch.setattr(
        audio_preparation, "audio_fingerprint", lambda *args: heard.append(args) or {}
    )
    content = sound(samples=np.stack([tone(4000), tone(4000, hz=300)], axis=1), subtype="PCM_24")
    for options in ({}, {"reencode": "always", "peak_dbfs": -1.0}, {"sample_rate_hz": 16_000}):
        (prepared,) = prepare(content, **options)
        waveform, rate = heard.pop()
        assert waveform.dtype == np.float32 and waveform.flags.c_contiguous
        assert rate == prepared.measures["sample_rate_hz"]
        expected = decode_audio(prepared.content, sample_rate_hz=None)
        np.testing.assert_array_equal(waveform, expected)


def test_channels_are_averaged():
    samples = noise(1000, channels=2) // 4
    (prepared,) = prepare(sound(samples=samples), mono=True)
    found = stored(prepared)[0]
    np.testing.assert_allclose(found, samples.mean(axis=1, keepdims=True), atol=0.51)


@pytest.mark.parametrize("new_rate", [4000, 16_000, 11_025])
def test_resampled_sound_is_that_of_scipy(new_rate):
    source = tone(RATE, hz=440) * np.hanning(RATE)  # fades, so that the ends say nothing
    (prepared,) = prepare(sound(samples=source, subtype="FLOAT"), sample_rate_hz=new_rate)
    found = stored(prepared, "float64")[0][:, 0]
    assert len(found) == new_rate
    np.testing.assert_allclose(found, scipy.signal.resample(source, new_rate), atol=1e-4)


def test_nothing_is_clipped():
    # A square wave at full scale rings when it is resampled; floats may exceed full scale anyway.
    square = np.sign(tone(RATE, hz=110)) * 0.999
    loud = tone(RATE, hz=110, peak=3.0)
    for samples, options in ((square, {"sample_rate_hz": 11_025}), (loud, {"reencode": "always"})):
        content = sound(samples=samples, subtype="FLOAT")
        (prepared,) = prepare(content, **options)
        found = stored(prepared, "float64")[0][:, 0]
        assert np.isclose(np.abs(found).max(), 1, atol=1e-4)
        rate = prepared.measures["sample_rate_hz"]
        expected = decode_audio(content, sample_rate_hz=rate)
        np.testing.assert_allclose(found, expected / np.abs(expected).max(), atol=5e-5)


def test_clips_of_one_recording_keep_their_proportions():
    samples = np.concatenate([tone(RATE, peak=0.2), tone(RATE, peak=2.0)])
    quiet, loud = prepare(sound(samples=samples, subtype="FLOAT"), clip_seconds=1.0)
    peaks = [np.abs(stored(each, "float64")[0]).max() for each in (quiet, loud)]
    np.testing.assert_allclose(peaks, [0.1, 1.0], atol=1e-3)


def test_loudness_changes_only_if_asked():
    content = sound(samples=tone(4000, peak=0.25))
    (prepared,) = prepare(content, reencode="always")
    assert np.isclose(np.abs(stored(prepared, "float64")[0]).max(), 0.25, atol=1e-3)
    for dbfs in (0.0, -6.0):
        (prepared,) = prepare(content, peak_dbfs=dbfs)
        peak = np.abs(stored(prepared, "float64")[0]).max()
        assert np.isclose(20 * np.log10(peak), dbfs, atol=0.01)
    silence = sound(samples=np.zeros(400))
    assert prepare(silence, peak_dbfs=-1.0)[0].content == silence


def test_huge_floats_end_in_a_reason_or_in_full_scale():
    samples = np.full((800, 2), 3e38, np.float32)
    content = sound(samples=samples, subtype="FLOAT")
    with np.errstate(over="ignore"), pytest.raises(MediaError) as caught:
        prepare(content, mono=True)
    assert caught.value.reason == "not_finite"
    (prepared,) = prepare(content, reencode="always")
    assert (stored(prepared)[0] >= 32_766).all()


# ----------------------------------------------------------------------- cutting, trimming


@settings(max_examples=60)
@given(st.integers(1, 9000), st.integers(100, 4000), st.floats(0, 1))
def test_pieces_follow_each_other_and_none_is_too_short(num_samples, length, share):
    samples = noise(num_samples)
    min_seconds = share * length / RATE
    options = {"clip_seconds": length / RATE, "min_seconds": min_seconds}
    pieces = prepare(sound(samples=samples), **options)
    found = np.concatenate([stored(each)[0] for each in pieces])
    np.testing.assert_array_equal(found, samples[: len(found)])
    left_out = num_samples - len(found)
    assert left_out < max(length / 2, min_seconds * RATE) and left_out < length
    starts = [round(each.measures["start_seconds"] * RATE) for each in pieces]
    assert starts == list(range(0, len(pieces) * length, length))
    for each in pieces:
        assert each.measures["seconds"] <= length / RATE
        assert each.measures["source_seconds"] == num_samples / RATE
        assert each.measures["is_reencoded"] == (num_samples > length)


def test_long_clips_are_trimmed_or_rejected_if_asked():
    samples = noise(5000)
    content = sound(samples=samples)
    (prepared,) = prepare(content, clip_seconds=0.25, long_clips="trim")
    np.testing.assert_array_equal(stored(prepared)[0], samples[:2000])
    with pytest.raises(MediaError, match="5000 frames at 8000 Hz") as caught:
        prepare(content, clip_seconds=0.25, long_clips="reject")
    assert caught.value.reason == "too_long"
    for reencode in ("never", "if_needed"):
        options = {"clip_seconds": 0.625, "long_clips": "reject", "reencode": reencode}
        assert prepare(content, **options)[0].content == content


def test_silent_ends_are_cut_off():
    loud = noise(3000, channels=2) // 2
    loud[[0, -1]] = 8000
    samples = np.concatenate([np.full((800, 2), 30), loud, np.full((400, 2), -30)]).astype(np.int16)
    (prepared,) = prepare(sound(samples=samples), trim_silence_dbfs=-50.0)  # 104 of 32768
    np.testing.assert_array_equal(stored(prepared)[0], loud)
    assert prepared.measures["start_seconds"] == 0.1
    assert prepared.measures["source_seconds"] == 4200 / RATE
    kept = sound(samples=samples)
    assert prepare(kept, trim_silence_dbfs=-70.0)[0].content == kept  # 10 of 32768
    silence = sound(samples=samples[:800])
    assert prepare(silence, trim_silence_dbfs=-50.0)[0].content == silence


def test_filters_look_at_each_clip_before_its_loudness_changes():
    samples = np.concatenate([tone(RATE), tone(RATE, peak=0.0001), tone(RATE)])
    content = sound(samples=samples, subtype="FLOAT")
    options = {"clip_seconds": 1.0, "min_peak_dbfs": -60.0, "peak_dbfs": 0.0}
    found = [each.found for each in prepare(content, **options)]
    assert found == [(), ("audio_silent",), ()]
    short = sound(samples=np.zeros(100))
    (prepared,) = prepare(short, min_peak_dbfs=-60.0, min_seconds=0.1)
    assert prepared.found == ("audio_silent", "audio_too_short")


# -------------------------------------------------------------------------------- limits


def test_seconds_and_channels_are_limited_by_the_header(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("decoded")

    monkeypatch.setattr(soundfile.SoundFile, "read", refuse)
    for content, options, reason in (
        (sound(), {"max_seconds": 0.4}, "too_long"),
        (sound(samples=noise(99, channels=3)), {}, "too_many_channels"),
        (sound(samples=noise(99, channels=2)), {"max_channels": 1}, "too_many_channels"),
    ):
        with pytest.raises(MediaError) as caught:
            prepare(content, **options)
        assert caught.value.reason == reason


def test_memory_is_limited_before_resampling_and_clips_to_what_training_decodes(monkeypatch):
    monkeypatch.setattr(decode, "MAX_AUDIO_VALUES", 9000)
    with pytest.raises(MediaError, match="too long at 48000 Hz"):
        prepare(sound(), sample_rate_hz=48_000)
    monkeypatch.setattr(audio_preparation, "MAX_AUDIO_SECONDS", 0.4)
    with pytest.raises(MediaError, match=r"or audio\.clip_seconds to cut it"):
        prepare(sound())
    assert prepare(sound(), clip_seconds=0.4)


def test_eight_channels_are_taken_if_asked():
    samples = noise(500, channels=8)
    (prepared,) = prepare(sound(samples=samples), reencode="always", max_channels=8)
    np.testing.assert_array_equal(stored(prepared)[0], samples)


def test_rates_that_flac_cannot_hold_are_kept_or_named():
    content = sound(samples=noise(500), sample_rate_hz=88_201)
    assert prepare(content)[0].content == content
    with pytest.raises(MediaError, match=r"set audio\.sample_rate_hz") as caught:
        prepare(content, reencode="always")
    assert caught.value.reason == "bad_sample_rate"
    assert prepare(content, sample_rate_hz=48_000)


# ---------------------------------------------------------------------------- containers


def test_an_mp3_is_walked_frame_by_frame():
    # Without the header that counts the frames, only the walk finds a truncated last frame.
    content = sound("MP3", samples=noise(20_000))
    first = mp3_frames._frame_bytes(content[:4])
    assert b"Xing" in content[:first] or b"Info" in content[:first]
    bare = content[first:]
    assert prepare(bare)
    assert prepare(bare + b"TAG" + bytes(125))  # ID3v1
    tagged = b"ID3\4\0\0" + bytes((0, 0, 2, 0)) + bytes(256) + bare
    assert prepare(tagged)[0].extension == "mp3"
    with pytest.raises(MediaError, match="truncated") as caught:
        prepare(bare[:-9])
    assert caught.value.reason == "truncated"


def test_a_wav_of_unknown_length_is_read_to_its_end():
    content = sound()
    place = content.index(b"data") + 4
    piped = content[:place] + struct.pack("<I", 0xFFFFFFFF) + content[place + 4 :]
    (prepared,) = prepare(piped)
    assert prepared.content == piped and prepared.measures["seconds"] == 0.5


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
def test_an_ogg_of_several_recordings_is_not_read_as_the_first(subtype):
    content = sound("OGG", subtype=subtype)
    with pytest.raises(MediaError, match=f"in a row: at byte {len(content)}") as caught:
        prepare(content + content)
    assert caught.value.reason == "chained"
