"""Parts of clips against slices of the whole."""

import io

import numpy as np
import pytest
import soundfile

from data_prep.media import audio_file, decode
from data_prep.media.decode import MediaError, decode_audio, decode_audio_part, mean_of_channels
from tests.support.bad_media import BAD_MEDIA

PLACES = (0.0, 0.013, 0.4, 0.77, 0.999999)


def encoded(sound_format, subtype=None, *, rate=8000, seconds=6.0, channels=2, **options):
    """Encodes noise under a slow envelope, so that no two parts are alike."""
    times = np.arange(round(rate * seconds)) / rate
    noise = 0.2 * np.random.default_rng(0).standard_normal((len(times), channels))
    sink = io.BytesIO()
    clip = np.clip(noise * (1.2 + np.sin(times))[:, None], -1, 1)
    with soundfile.SoundFile(
        sink, "w", rate, channels, format=sound_format, subtype=subtype, **options
    ) as file:
        for second in np.array_split(clip, seconds):  # libsndfile's Opus fails on long writes
            file.write(second)
    return sink.getvalue()


def part_and_slice(content, place, *, sample_rate_hz=8000, num_samples=4000):
    """Decodes the part, and the slice of the whole clip that it should equal."""
    part = decode_audio_part(
        content, sample_rate_hz=sample_rate_hz, num_samples=num_samples, place=place
    )
    own, rate = soundfile.read(io.BytesIO(content), always_2d=True)
    start = int(place * (len(own) * sample_rate_hz // rate - num_samples + 1))
    return part, decode_audio(content, sample_rate_hz=sample_rate_hz)[start : start + num_samples]


def decibels_apart(ours, theirs):
    error = np.square(ours - theirs, dtype=np.float64).mean()
    return 10 * np.log10(np.square(theirs, dtype=np.float64).mean() / max(error, 1e-30))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("sound_format", "subtype", "options"),
    [
        ("WAV", "PCM_16", {}),
        ("WAV", "FLOAT", {}),
        ("WAV", "MS_ADPCM", {}),
        ("WAV", "GSM610", {"channels": 1}),
        ("AIFF", "PCM_24", {}),
        ("FLAC", "PCM_16", {}),
        ("OGG", "VORBIS", {}),
        ("MP3", "MPEG_LAYER_III", {}),
        # At few bits, frames of MP3 lean on many frames before them.
        ("MP3", "MPEG_LAYER_III", {"compression_level": 0.99, "rate": 22050}),
        ("MP3", "MPEG_LAYER_III", {"compression_level": 0.99, "rate": 48000}),
    ],
)
def test_a_part_is_that_slice_of_the_whole(sound_format, subtype, options, place):
    content = encoded(sound_format, subtype, **options)
    rate = options.get("rate", 8000)
    part, expected = part_and_slice(content, place, sample_rate_hz=rate)
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", [{}, {"compression_level": 0.99}])
def test_a_part_of_opus_is_that_slice_to_a_hundred_decibels(options, place):
    content = encoded("OGG", "OPUS", rate=48000, **options)
    part, expected = part_and_slice(content, place, sample_rate_hz=48000, num_samples=30000)
    assert decibels_apart(part, expected) > 100


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("rate", "sample_rate_hz"),
    [(44100, 48000), (48000, 16000), (22050, 48000), (8000, 48000), (96000, 44100), (11025, 32000)],
)
def test_a_resampled_part_is_that_slice_of_the_resampled_whole(rate, sample_rate_hz, place):
    content = encoded("FLAC", "PCM_16", rate=rate)
    part, expected = part_and_slice(
        content, place, sample_rate_hz=sample_rate_hz, num_samples=sample_rate_hz
    )
    assert len(part) == len(expected) == sample_rate_hz
    assert decibels_apart(part, expected) > 100


def test_rates_without_a_common_divisor_keep_their_times_too():
    content = encoded("WAV", "FLOAT", rate=44101)
    part, expected = part_and_slice(content, 0.7, sample_rate_hz=48000, num_samples=20000)
    assert decibels_apart(part, expected) > 90


def test_little_more_than_the_part_is_read(monkeypatch):
    read = []

    def counting(file, num_frames):
        read.append(num_frames)
        return audio_file.read_frames(file, num_frames)

    monkeypatch.setattr(decode, "read_frames", counting)
    content = encoded("FLAC", "PCM_16", rate=44100)
    for sample_rate_hz, expected in ((44100, 4000), (48000, 3675)):
        part_and_slice(content, 0.5, sample_rate_hz=sample_rate_hz)
        assert expected <= read.pop(0) <= expected + 2 * 256 + 147 + 1


def test_a_clip_that_is_no_longer_is_decoded_whole():
    for seconds, sample_rate_hz in ((0.5, 8000), (0.4, 8000), (0.4, 11025), (0.01, 11025)):
        content = wav_of(seconds)
        num_samples = round(0.5 * sample_rate_hz)
        part = decode_audio_part(
            content, sample_rate_hz=sample_rate_hz, num_samples=num_samples, place=0.9
        )
        expected = decode_audio(content, sample_rate_hz=sample_rate_hz)[:num_samples]
        np.testing.assert_array_equal(part, expected)


def wav_of(seconds):
    sink = io.BytesIO()
    noise = 0.2 * np.random.default_rng(0).standard_normal((round(8000 * seconds), 2))
    soundfile.write(sink, noise, 8000, format="WAV", subtype="FLOAT")
    return sink.getvalue()


@pytest.mark.parametrize(
    "name", [name for name, (_, kind, reason) in BAD_MEDIA.items() if kind == "audio"]
)
def test_what_decode_audio_refuses_is_refused_in_part(name):
    make, _, reason = BAD_MEDIA[name]
    content = make()
    try:
        decode_audio(content, sample_rate_hz=8000)
    except MediaError as error:
        with pytest.raises(MediaError) as caught:
            decode_audio_part(content, sample_rate_hz=8000, num_samples=10**9, place=0.0)
        assert caught.value.reason == error.reason
    else:
        assert reason != "undecodable"


def test_values_that_are_not_finite_are_refused_where_they_are_read():
    sink = io.BytesIO()
    clip = np.zeros(8000)
    clip[6000] = np.nan
    soundfile.write(sink, clip, 8000, format="WAV", subtype="FLOAT")
    arguments = {"sample_rate_hz": 8000, "num_samples": 1000}
    assert not decode_audio_part(sink.getvalue(), place=0.0, **arguments).any()
    with pytest.raises(MediaError, match="NaN or infinity"):
        decode_audio_part(sink.getvalue(), place=0.8, **arguments)


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_the_mean_of_channels_is_numpys(channels):
    waveform = np.random.default_rng(0).standard_normal((999, channels)).astype(np.float32)
    expected = waveform.mean(axis=1)
    ours = mean_of_channels(waveform)
    assert ours.dtype == np.float32
    if channels <= 2:
        np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
