import io
import time

import numpy as np
import pytest
import soundfile
import soxr

from data_prep.dedup.near_audio import (
    NEIGHBOURS,
    ClipWords,
    audio_similarity,
    near_audio_pairs,
    required_similarity,
)
from data_prep.demo.sounds import SOUNDS, synthesise
from data_prep.media.audio_fingerprint import audio_fingerprint, words_of

RATE_HZ = 16_000
MIN_SIMILARITY = 0.7
KINDS = sorted(SOUNDS)


def clip_of(kind, number):
    return synthesise(kind, np.random.default_rng([number, KINDS.index(kind)])).astype(np.float32)


def words(waveform, rate_hz=RATE_HZ):
    return words_of(audio_fingerprint(waveform, rate_hz)["fingerprint"])


def recoded(waveform, rate_hz, **options):
    sink = io.BytesIO()
    soundfile.write(sink, waveform, rate_hz, **options)
    sink.seek(0)
    return soundfile.read(sink, dtype="float32")


def mp3(waveform):
    options = {"format": "MP3", "subtype": "MPEG_LAYER_III", "compression_level": 0.6}
    return recoded(waveform, RATE_HZ, **options)


def vorbis(waveform):
    return recoded(waveform, RATE_HZ, format="OGG", subtype="VORBIS", compression_level=0.6)


def opus(waveform):
    options = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.7}
    return recoded(soxr.resample(waveform, RATE_HZ, 48_000), 48_000, **options)


def with_noise(waveform):
    power = np.sqrt(np.mean(waveform**2)) * 10 ** (-30 / 20)
    noise = np.random.default_rng(0).normal(size=len(waveform)) * power
    return (waveform + noise).astype(np.float32), RATE_HZ


EDITS = {
    "mp3": mp3,
    "vorbis": vorbis,
    "opus": opus,
    "8 kHz": lambda clip: (soxr.resample(clip, RATE_HZ, 8000), 8000),
    "44.1 kHz": lambda clip: (soxr.resample(clip, RATE_HZ, 44_100), 44_100),
    "quieter": lambda clip: (0.2 * clip, RATE_HZ),
    "begins later": lambda clip: (clip[len(clip) // 11 :], RATE_HZ),
    "ends earlier": lambda clip: (clip[: -len(clip) // 11], RATE_HZ),
    "silence before": lambda clip: (np.pad(clip, (len(clip) // 11, 0)), RATE_HZ),
    "noise": with_noise,
}


def is_match(first, second):
    similarity, seconds = audio_similarity(first, second)
    return similarity >= required_similarity(seconds, min_similarity=MIN_SIMILARITY)


@pytest.fixture(scope="module")
def originals():
    return [clip_of(kind, number) for kind in KINDS for number in range(4)]


@pytest.fixture(scope="module")
def fingerprints(originals):
    return [words(clip) for clip in originals]


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_clip_is_still_like_the_original(name, originals, fingerprints):
    pairs = zip(originals[::2], fingerprints[::2], strict=True)
    found = [is_match(original, words(*EDITS[name](clip))) for clip, original in pairs]
    assert np.mean(found) >= 0.95


def test_other_sounds_of_the_same_kind_are_not_alike(fingerprints):
    for place, first in enumerate(fingerprints):
        for second in fingerprints[place // 4 * 4 : place]:
            assert not is_match(first, second)


def test_a_part_of_a_clip_is_another_clip(originals, fingerprints):
    half = words(originals[0][: len(originals[0]) // 2])
    assert audio_similarity(half, fingerprints[0]) == (0.0, 0.0)


@pytest.mark.parametrize("num_samples", [0, 1, 7, 500, 1024])
def test_short_and_silent_clips_have_fingerprints_that_match_nothing(num_samples):
    rng = np.random.default_rng(0)
    for waveform in (np.zeros(num_samples), rng.normal(size=num_samples)):
        found = words(waveform.astype(np.float32), 8000)
        assert len(found) < 10
    assert not is_match(words(np.zeros(20_000)), words(np.zeros(20_000)))


def test_loudness_and_a_constant_silence_do_not_count(originals):
    quiet = words(originals[0] * 2**-10)
    assert np.array_equal(quiet, words(originals[0]))
    silence = np.zeros(8 * RATE_HZ, np.float32)
    click, other = silence.copy(), silence.copy()
    click[10_000:13_000] = originals[0][5000:8000]
    other[10_000:13_000] = originals[20][5000:8000]
    assert is_match(words(click), words(0.5 * click))
    assert not is_match(words(click), words(other))


def test_a_fingerprint_of_ten_seconds_takes_few_bytes_and_little_time():
    clip = np.random.default_rng(0).normal(size=10 * 48_000).astype(np.float32)
    start = time.process_time()
    fingerprint = audio_fingerprint(clip, 48_000)["fingerprint"]
    assert time.process_time() - start < 10  # CPU seconds; about 0.02
    assert len(fingerprint) == 4 * 622


# ------------------------------------------------------------------------------ among many clips


def joined(fingerprints):
    sizes = [len(found) for found in fingerprints]
    return ClipWords(np.concatenate(fingerprints), np.concatenate([[0], np.cumsum(sizes)]))


def all_pairs(fingerprints):
    """Compares every clip with every other in every alignment: the obvious way."""
    return {
        (first, second)
        for second in range(len(fingerprints))
        for first in range(second)
        if is_match(fingerprints[first], fingerprints[second])
    }


@pytest.fixture(scope="module")
def many(originals, fingerprints):
    edits = list(EDITS.values())
    copies = [words(*edits[n % len(edits)](clip)) for n, clip in enumerate(originals)]
    return [*fingerprints, *copies, np.zeros(100, np.uint32), np.zeros(100, np.uint32)]


def pairs_of(clips, **options):
    first, second, similarity = near_audio_pairs(clips, min_similarity=MIN_SIMILARITY, **options)
    assert (first < second).all() and (similarity >= MIN_SIMILARITY).all()
    return set(zip(first.tolist(), second.tolist(), strict=True))


def test_pairs_are_those_of_the_double_loop(many):
    found, expected = pairs_of(joined(many)), all_pairs(many)
    assert found <= expected
    assert len(expected) >= 46
    assert len(found) >= 0.97 * len(expected)


def test_little_memory_finds_the_same_pairs(many, originals):
    some = joined([*many[:12], *many[len(originals) :][:12]])  # with their copies
    expected = pairs_of(some)
    assert len(expected) >= 10
    assert pairs_of(some, memory_bytes=10_000) == expected


def test_pairs_among_what_is_not_queried_are_left_out(many):
    clips = joined(many + many)
    found = pairs_of(clips, num_queries=10)
    assert found == {pair for pair in pairs_of(clips) if pair[0] < 10}


def test_many_copies_of_one_clip_are_connected_but_not_all_compared(many):
    copies = [many[0]] * 60  # 1,770 pairs
    found = pairs_of(joined(copies))
    assert len(found) <= 60 * NEIGHBOURS
    assert {(n, n + 1) for n in range(59)} <= found


def test_nothing_comes_of_nothing():
    empty = ClipWords(np.empty(0, np.uint32), np.zeros(4, np.int64))
    assert not pairs_of(empty)
