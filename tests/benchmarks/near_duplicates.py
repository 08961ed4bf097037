"""Near-duplicate search: recall and precision for edited clips, and speed for clips and captions.

    python -m tests.benchmarks.near_duplicates [FOLDER]

Clips are synthesised, or they are the .wav and .flac files of FOLDER, which must be of different
recordings. Captions are random words. If datasketch is installed, its MinHash is measured, too.
"""

from __future__ import annotations

import importlib.util
import io
import random
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr

from data_prep.config import NearCaptions, NearMedia
from data_prep.dedup.minhash import near_caption_pairs, read_shingles
from data_prep.dedup.near_audio import ClipWords, near_audio_pairs
from data_prep.demo.sounds import SAMPLE_RATE_HZ, SOUNDS, synthesise
from data_prep.media.audio_fingerprint import audio_fingerprint, words_of

Clip = tuple[np.ndarray, int]  # float32 [samples], rate in Hz
CLIPS_PER_KIND = 40
MOST_CLIPS = 500  # of a folder that are edited; all of them are in the search
NUM_LONG_CLIPS = 20_000
LONG_CLIP_WORDS = 622  # 10 s
NUM_CAPTIONS = 100_000
NUM_PEER_CAPTIONS = 2000


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    clips = synthesised_clips() if folder is None else clips_of(folder)
    report_audio(clips)
    report_audio_speed()
    report_captions()


def synthesised_clips() -> list[Clip]:
    return [
        (synthesise(kind, np.random.default_rng([n, k])).astype(np.float32), SAMPLE_RATE_HZ)
        for k, kind in enumerate(SOUNDS)
        for n in range(CLIPS_PER_KIND)
    ]


def clips_of(folder: Path) -> list[Clip]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix in (".wav", ".flac"))
    clips = [soundfile.read(path, dtype="float32", always_2d=True) for path in paths]
    return [(waveform.mean(axis=1), rate_hz) for waveform, rate_hz in clips]


# --------------------------------------------------------------------------------------- edits


def recoded(clip: Clip, **options: object) -> Clip:
    sink = io.BytesIO()
    soundfile.write(sink, *clip, **options)
    sink.seek(0)
    return soundfile.read(sink, dtype="float32")


def mp3(clip: Clip) -> Clip:
    return recoded(clip, format="MP3", subtype="MPEG_LAYER_III", compression_level=0.6)


def vorbis(clip: Clip) -> Clip:
    return recoded(clip, format="OGG", subtype="VORBIS", compression_level=0.7)


def opus(clip: Clip) -> Clip:
    options = {"format": "OGG", "subtype": "OPUS", "compression_level": 0.8}
    return recoded(resampled(clip, 48_000), **options)


def resampled(clip: Clip, rate_hz: int) -> Clip:
    return soxr.resample(*clip, rate_hz), rate_hz


def noisy(clip: Clip, *, decibels: float) -> Clip:
    waveform, rate_hz = clip
    level = np.sqrt(np.mean(waveform**2)) * 10 ** (-decibels / 20)
    noise = np.random.default_rng(len(waveform)).normal(size=len(waveform)) * level
    return (waveform + noise).astype(np.float32), rate_hz


def trimmed(clip: Clip, *, start: float, end: float) -> Clip:
    waveform, rate_hz = clip
    return waveform[int(start * len(waveform)) : int((1 - end) * len(waveform))], rate_hz


def delayed(clip: Clip) -> Clip:
    return np.pad(clip[0], (len(clip[0]) // 10, 0)), clip[1]


EDITS = {
    "mp3": mp3,
    "vorbis": vorbis,
    "opus": opus,
    "to 8 kHz": lambda clip: resampled(clip, 8000),
    "to 44.1 kHz": lambda clip: resampled(clip, 44_100),
    "12 dB quieter": lambda clip: (clip[0] / 4, clip[1]),
    "clipped": lambda clip: (np.clip(1.3 * clip[0] / np.abs(clip[0]).max(), -1, 1), clip[1]),
    "noise, 30 dB": lambda clip: noisy(clip, decibels=30),
    "first 10 % cut": lambda clip: trimmed(clip, start=0.1, end=0),
    "last 10 % cut": lambda clip: trimmed(clip, start=0, end=0.1),
    "5 % cut at both ends": lambda clip: trimmed(clip, start=0.05, end=0.05),
    "silence before, 10 %": delayed,
    "cut, noise and mp3": lambda clip: mp3(noisy(trimmed(clip, start=0.07, end=0), decibels=30)),
}

# --------------------------------------------------------------------------------------- audio


def words(clip: Clip) -> np.ndarray:
    return words_of(audio_fingerprint(clip[0].astype(np.float32), clip[1])["fingerprint"])


def joined(fingerprints: list[np.ndarray]) -> ClipWords:
    sizes = [len(fingerprint) for fingerprint in fingerprints]
    return ClipWords(np.concatenate(fingerprints), np.concatenate([[0], np.cumsum(sizes)]))


def report_audio(clips: list[Clip]) -> None:
    seconds = np.mean([len(waveform) / rate for waveform, rate in clips])
    start = time.process_time()
    originals = [words(clip) for clip in clips]
    each = (time.process_time() - start) / len(clips)
    print(f"{len(clips)} clips of {seconds:.2f} s, fingerprints: {1000 * each:.1f} ms of CPU each")
    edited = range(0, len(clips), max(1, len(clips) // MOST_CLIPS))
    num_right = num_found = num_wanted = 0
    print(f"{'edit':<24}{'recall':>8}{'wrong pairs':>13}")
    for name, edit in EDITS.items():
        copies = [words(edit(clips[number])) for number in edited]
        found = pairs_of(originals + copies)
        wanted = {(number, len(clips) + index) for index, number in enumerate(edited)}
        # What is wrong among the originals alone is counted below, once.
        touching = {pair for pair in found if pair[1] >= len(clips)}
        num_right += len(touching & wanted)
        num_found += len(touching)
        num_wanted += len(wanted)
        recall = len(touching & wanted) / len(wanted)
        print(f"{name:<24}{recall:>8.3f}{len(touching - wanted):>13}")
    print(f"all: recall {num_right / num_wanted:.4f}, precision {num_right / num_found:.4f}")
    print(f"pairs among the {len(clips)} originals, all of them wrong: {len(pairs_of(originals))}")


def pairs_of(fingerprints: list[np.ndarray]) -> set[tuple[int, int]]:
    min_similarity = NearMedia().audio_min_similarity
    first, second, _ = near_audio_pairs(joined(fingerprints), min_similarity=min_similarity)
    return set(zip(first.tolist(), second.tolist(), strict=True))


def report_audio_speed() -> None:
    """Measures the search among random fingerprints, whose bits persist as those of clips do."""
    rng = np.random.default_rng(0)
    fingerprints = []
    for _ in range(NUM_LONG_CLIPS):
        walk = np.cumsum(rng.normal(size=(LONG_CLIP_WORDS + 8, 32)), axis=0)
        bits = walk[8:] > walk[:-8]
        fingerprints.append(np.packbits(bits, axis=1, bitorder="little").view("<u4")[:, 0])
    start = time.process_time()
    pairs = pairs_of(fingerprints)
    print(
        f"search among {NUM_LONG_CLIPS:,} clips of 10 s: {time.process_time() - start:.1f} s of "
        f"CPU, {len(pairs)} pairs, {peak_mb():,.0f} MB at most"
    )


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


# ------------------------------------------------------------------------------------ captions


def report_captions() -> None:
    options = NearCaptions()
    captions = random_captions()
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        sets = read_shingles(
            [captions],
            Path(folder),
            shingle_words=options.shingle_words,
            permutations=options.permutations,
        )
        hashed = time.process_time()
        first, _, _ = near_caption_pairs(sets, min_jaccard=options.min_jaccard)
        compared = time.process_time()
    per_caption = 1e6 / len(captions)
    print(
        f"{len(captions):,} captions, {options.permutations} MinHashes: "
        f"{(hashed - start) * per_caption:.1f} us of CPU each, search "
        f"{(compared - hashed) * per_caption:.1f} us, {len(first)} pairs"
    )
    if importlib.util.find_spec("datasketch") is None:
        print("datasketch is not installed")
    else:
        report_datasketch(captions[:NUM_PEER_CAPTIONS], options)


def report_datasketch(captions: list[str], options: NearCaptions) -> None:
    from datasketch import MinHash, MinHashLSH

    start = time.process_time()
    hashes = []
    for caption in captions:
        tokens = caption.lower().split()
        runs = (tokens[n : n + options.shingle_words] for n in range(max(1, len(tokens) - 2)))
        hashes.append(MinHash(num_perm=options.permutations))
        hashes[-1].update_batch([" ".join(run).encode() for run in runs])
    hashed = time.process_time()
    search = MinHashLSH(threshold=options.min_jaccard, num_perm=options.permutations)
    for number, sketch in enumerate(hashes):
        search.insert(number, sketch)
    for sketch in hashes:
        search.query(sketch)
    compared = time.process_time()
    per_caption = 1e6 / len(captions)
    print(
        f"datasketch: {(hashed - start) * per_caption:.1f} us of CPU each, search "
        f"{(compared - hashed) * per_caption:.1f} us"
    )


def random_captions() -> list[str]:
    """Draws captions from a thousand words by Zipf's law; one in ten repeats another."""
    rng = random.Random(0)
    vocabulary = [f"word{number}" for number in range(1000)]
    weights = [1 / (number + 1) for number in range(1000)]
    captions: list[str] = []
    for number in range(NUM_CAPTIONS):
        if number % 10 == 9:
            captions.append(rng.choice(captions) + " again")
        else:
            captions.append(" ".join(rng.choices(vocabulary, weights, k=rng.randint(5, 18))))
    return captions


if __name__ == "__main__":
    main()
