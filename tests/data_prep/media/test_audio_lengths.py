"""Lengths of audio files whose headers lie, or state no length."""

import io
import struct

import numpy as np
import pytest
import soundfile

from data_prep.media.audio_container import _ogg_crc32, complete_audio
from data_prep.media.audio_file import audio_seconds, read_waveform
from data_prep.media.decode import decode_audio_part
from data_prep.media.formats import MediaError
from tests.support.bad_media import BAD_MEDIA, patched, sound

RATE = 16_000
ENCODER_DELAY = 576  # samples that LAME puts before the sound


def encoded(sound_format, *, rate=RATE, channels=1, samples=40_000, **options):
    """Encodes noise that becomes silence, so that bit rates vary."""
    noise = 0.4 * np.random.default_rng(0).standard_normal((samples, channels)).clip(-2, 2)
    noise[samples // 2 :] *= 1e-3
    sink = io.BytesIO()
    soundfile.write(sink, noise, rate, format=sound_format, **options)
    return sink.getvalue()


def mp3(rate, channels, **options):
    return encoded("MP3", rate=rate, channels=channels, bitrate_mode="VARIABLE", **options)


def mp3_frames(content):
    """Splits an MP3 file at the headers of its frames, by a search for their fixed bits."""
    mask = b"\xff\xfe\x0c"  # sync, version, layer, protection; sampling rate
    fixed = bytes(a & b for a, b in zip(content, mask, strict=False))
    starts = [
        place
        for place in range(len(content) - 3)
        if content[place] == 0xFF
        and bytes(a & b for a, b in zip(content[place : place + 3], mask, strict=True)) == fixed
        and content[place + 3] & 0xC0 == content[3] & 0xC0
    ]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], len(content)], strict=True)]


KINDS_OF_MP3 = [(44_100, 1), (48_000, 2), (22_050, 2), (16_000, 1), (8000, 1)]


@pytest.mark.parametrize(("rate", "channels"), KINDS_OF_MP3)
def test_the_length_of_an_mp3_is_that_of_its_frames_whatever_its_header_says(rate, channels):
    whole = mp3(rate, channels, compression_level=0.3)
    expected, _ = read_waveform(whole)
    assert len(expected) == 40_000 and complete_audio(whole) is whole
    tag, *frames = mp3_frames(whole)
    bare = b"".join(frames)
    samples_per_frame = 1152 if rate >= 32_000 else 576
    id3 = b"ID3\4\0\0" + bytes((0, 0, 2, 0)) + bytes(256)
    for name, content in {
        "no tag": bare,
        "no tag, ID3 before and after": id3 + bare + b"TAG" + bytes(125),
        "no tag, a tag between the frames": frames[0] + id3 + b"".join(frames[1:]),
        "a tag without the number": tag.replace(b"Xing\0\0\0\x0f", b"Xing\0\0\0\x0e") + bare,
        **{
            f"a VBRI tag of {stated} frames": vbri(frames, stated) + bare
            for stated in (0, len(frames) // 2, len(frames), len(frames) + 1)
        },
    }.items():
        found, found_rate = read_waveform(content)
        delay = ENCODER_DELAY if len(found) % samples_per_frame else ENCODER_DELAY + 529
        part = found[delay : delay + len(expected)]
        if "between" not in name:  # a gap costs the frames that depend on those before it
            np.testing.assert_allclose(part, expected, atol=1e-4, err_msg=name)
        missing = len(frames) * samples_per_frame - len(found)
        assert (found_rate, missing) in ((rate, 0), (rate, 529)), name
        assert audio_seconds(content) == (len(found) / rate, rate)
        last = decode_audio_part(content, sample_rate_hz=rate, num_samples=999, place=0.999999)
        np.testing.assert_allclose(last, found.mean(axis=1)[-len(last) :], atol=1e-6)
    for stated in (0, 1, len(frames) // 2, len(frames) - 1):
        lying = tag.replace(struct.pack(">I", len(frames)), struct.pack(">I", stated), 1) + bare
        np.testing.assert_array_equal(read_waveform(lying)[0], expected)


def vbri(frames, num_frames):
    """Builds the tag of Fraunhofer's encoders, in a frame as large as the largest."""
    largest = max(frames, key=len)
    tag = b"VBRI" + struct.pack(">HHHII", 1, 0, 75, sum(map(len, frames)), num_frames)
    return (largest[:4] + bytes(32) + tag).ljust(len(largest), b"\0")


def test_an_mp3_that_states_more_frames_than_it_has_is_truncated():
    content = mp3(44_100, 1)
    last = mp3_frames(content)[-1]
    with pytest.raises(MediaError, match="ends after") as caught:
        read_waveform(content[: -len(last)])
    assert caught.value.reason == "truncated"
    frames = mp3_frames(content)[1:]
    with pytest.raises(MediaError, match="expected 90 frames") as caught:
        read_waveform(vbri(frames, 90) + b"".join(frames))
    assert caught.value.reason == "truncated"


def with_total(flac, total, start=0):
    place = start + 21
    return patched(flac, place, (flac[place] >> 4 << 36 | total).to_bytes(5, "big"))


@pytest.mark.parametrize("samples", [1, 100, 4095, 4096, 4097, 40_000, 300_000])
@pytest.mark.parametrize(("channels", "rate"), [(1, 16_000), (2, 44_100), (3, 50_001)])
def test_the_length_of_a_flac_is_that_of_its_frames_whatever_its_header_says(
    samples, channels, rate
):
    content = encoded("FLAC", samples=samples, channels=channels, rate=rate)
    expected, _ = read_waveform(content)
    assert len(expected) == samples and complete_audio(content) is content
    for total in {0, 1, samples // 2, samples - 1}:
        lying = with_total(content, total)
        assert complete_audio(lying) == content
        assert complete_audio(lying + b"TAG" + bytes(125)) == content + b"TAG" + bytes(125)
        np.testing.assert_array_equal(read_waveform(lying)[0], expected)
    id3 = b"ID3\4\0\0" + bytes((0, 0, 2, 0)) + bytes(256)
    assert complete_audio(id3 + with_total(content, 0)) == id3 + content


def test_a_flac_of_unknown_length_that_is_cut_is_truncated():
    content = with_total(encoded("FLAC"), 0)
    for end in (len(content) - 1, len(content) - 300, len(content) // 2, 60, 42, 30, 20):
        with pytest.raises(MediaError) as caught:
            read_waveform(content[:end])
        assert caught.value.reason == ("truncated" if end > 25 else "undecodable")


@pytest.mark.parametrize("sound_format", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "ULAW"])
@pytest.mark.parametrize("size", [0, 0x7FFFF000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_wav_that_was_not_finished_is_read_to_its_end(sound_format, subtype, size):
    content = encoded(sound_format, subtype=subtype)
    expected, _ = read_waveform(content)
    if sound_format == "RF64":
        long_size = {0: 0, 0xFFFFFFFF: 2**64 - 1}.get(size, 2**63 - 1)
        lying = patched(content, content.index(b"ds64") + 16, struct.pack("<Q", long_size))
    else:
        lying = patched(content, content.index(b"data") + 4, struct.pack("<I", size))
    np.testing.assert_array_equal(read_waveform(lying)[0], expected)
    riff = patched(lying, 4, struct.pack("<I", size))
    np.testing.assert_array_equal(read_waveform(riff)[0], expected)


def test_a_wav_without_sound_before_another_chunk_has_no_samples():
    content = sound()
    start = content.index(b"data") + 8
    empty = patched(content, start - 4, bytes(4))[:start]
    for more in (b"", b"LIST" + struct.pack("<I", 4) + b"INFO", b"\0"):
        with pytest.raises(MediaError) as caught:
            read_waveform(empty + more)
        assert caught.value.reason == "no_samples"


@pytest.mark.parametrize("size", [0, 0x7F000008, 0xFFFFFFFF])
def test_an_aiff_that_was_not_finished_is_read_to_its_end(size):
    content = sound("AIFF")
    lying = patched(content, content.index(b"SSND") + 4, struct.pack(">I", size))
    lying = patched(lying, lying.index(b"COMM") + 10, bytes(4))
    np.testing.assert_array_equal(read_waveform(lying)[0], read_waveform(content)[0])


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("position", [-1, 0, 100])
def test_an_ogg_whose_last_page_goes_back_in_time_is_refused(subtype, position):
    content = encoded("OGG", subtype=subtype)
    last = content.rindex(b"OggS")
    page = patched(content[last:], 6, struct.pack("<q", position))
    page = patched(page, 22, struct.pack("<I", _ogg_crc32(page)))
    with pytest.raises(MediaError, match=f"ends at sample {position}; expected at least"):
        read_waveform(content[:last] + page)


def test_messages_about_bad_audio_are_the_same_in_every_process():
    list_of_2_gb = patched(sound(), 36, b"LIST" + struct.pack("<I", 0x7FFFFFFF))
    bad = [make() for make, kind, _ in BAD_MEDIA.values() if kind == "audio"]
    for content in (list_of_2_gb, *bad):
        details = set()
        for _ in range(2):
            try:
                read_waveform(content)
            except MediaError as error:
                details.add(str(error))
        assert len(details) <= 1 and "0x" not in "".join(details)
