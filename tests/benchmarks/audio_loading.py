"""Loading clips for training, compared with LAION-CLAP's way: clips per CPU second, the best.

    python -m tests.benchmarks.audio_loading

Crops of 10 s out of clips of 60 s, and clips of 10 s whole, mono at 48 kHz. LAION-CLAP's training
code decodes a whole clip, rounds it to 16 bits, and then crops it. Its steps are repeated here with
soundfile, which decodes for both. The log-mel is timed separately, in one thread on the CPU. In
training it follows on the device.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence

import numpy as np
import soundfile
import torch

from pretrain.data.transforms import AudioToWaveform
from pretrain.model.log_mel import LogMelSpectrogram
from pretrain.sampling.keyed_random import SampleRandom, sample_random
from pretrain.settings.transforms import AudioTransform
from tests.support.training_rows import training_row

CONFIG = AudioTransform()  # 10 s at 48 kHz, as LAION-CLAP
CLIP_SAMPLES = round(CONFIG.clip_seconds * CONFIG.sample_rate_hz)
FORMATS = {"flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16"), "ogg": ("OGG", "VORBIS")}
SECONDS = (60, 10)
NUM_CLIPS = 8
NUM_ROUNDS = 7
FRAMES_AT_ONCE = 48_000  # libsndfile's Vorbis encoder overflows its stack with many
MEL_BATCH = 16
Load = Callable[[bytes, str, SampleRandom], torch.Tensor]


def main() -> None:
    torch.set_num_threads(1)
    transform = AudioToWaveform(CONFIG)
    loaders: dict[str, Load] = {
        "isopair": lambda content, extension, rng: training_row(transform, content, extension, rng)[
            0
        ],
        "LAION-CLAP's way": load_as_laion_clap,
    }
    for seconds in SECONDS:
        sounds = [sound(number, seconds) for number in range(NUM_CLIPS)]
        for extension in FORMATS:
            clips = [encode(each, extension) for each in sounds]
            show(f"10 s of {seconds} s, {extension}", clips, extension, loaders)
    print(f"log-mel on the CPU: {mel_seconds() * 1e3:.2f} ms a clip of 10 s")


def load_as_laion_clap(content: bytes, extension: str, rng: SampleRandom) -> torch.Tensor:
    """Loads float32 [clip samples]: decoded whole, rounded to 16 bits, cropped or repeated."""
    waveform, _ = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    first_channel = torch.from_numpy(np.ascontiguousarray(waveform[:, 0]))
    levels = (first_channel.clamp(-1, 1) * 32767).to(torch.int16)
    clip = (levels / 32767).to(torch.float32)
    surplus = len(clip) - CLIP_SAMPLES
    if surplus >= 0:
        start = rng.below(surplus + 1)
        return clip[start : start + CLIP_SAMPLES]
    repeated = clip.repeat(CLIP_SAMPLES // len(clip))
    return torch.nn.functional.pad(repeated, (0, CLIP_SAMPLES - len(repeated)))


def sound(seed: int, seconds: int) -> np.ndarray:
    """Makes float32 [samples]: brown-ish noise that swells and fades, and a wandering tone."""
    rng = np.random.default_rng(seed)
    num_samples = seconds * CONFIG.sample_rate_hz
    spectrum = np.fft.rfft(rng.standard_normal(num_samples))
    spectrum /= 1 + np.arange(len(spectrum)) / (500 * seconds)  # falls from 500 Hz on
    noise = np.fft.irfft(spectrum, num_samples)
    time_seconds = np.arange(num_samples) / CONFIG.sample_rate_hz
    swell = 0.55 + 0.45 * np.sin(2 * np.pi * (time_seconds / rng.uniform(2, 5) + rng.random()))
    pitch_hz = 600 + 300 * np.sin(2 * np.pi * time_seconds / rng.uniform(3, 8))
    tone = np.sin(2 * np.pi * np.cumsum(pitch_hz) / CONFIG.sample_rate_hz)
    clip = swell * noise / noise.std() + 0.5 * tone
    return (clip / np.abs(clip).max() * 0.7).astype(np.float32)


def encode(waveform: np.ndarray, extension: str) -> bytes:
    container, subtype = FORMATS[extension]
    sink = io.BytesIO()
    settings = {"format": container, "subtype": subtype, "channels": 1}
    with soundfile.SoundFile(sink, "w", CONFIG.sample_rate_hz, **settings) as file:
        for start in range(0, len(waveform), FRAMES_AT_ONCE):
            file.write(waveform[start : start + FRAMES_AT_ONCE])
    return sink.getvalue()


def show(what: str, clips: Sequence[bytes], extension: str, loaders: dict[str, Load]) -> None:
    seconds = {name: [] for name in loaders}
    for epoch in range(NUM_ROUNDS):
        for name, load in loaders.items():
            start = time.process_time()
            for ordinal, clip in enumerate(clips):
                rng = sample_random(0, source="sounds", epoch=epoch, ordinal=ordinal, view="image")
                assert load(clip, extension, rng).shape == (CLIP_SAMPLES,)
            seconds[name].append(time.process_time() - start)
    ours, theirs = (len(clips) / min(each) for each in seconds.values())
    kilobytes = np.mean([len(clip) for clip in clips]) / 1000
    print(
        f"{what}, {kilobytes:,.0f} kB: {ours:,.0f} clips per CPU second, LAION-CLAP's way "
        f"{theirs:,.0f}: {ours / theirs:.2f} times",
        flush=True,
    )


def mel_seconds() -> float:
    """Measures CPU seconds per clip, in the best of NUM_ROUNDS batches."""
    log_mel = LogMelSpectrogram(CONFIG)
    waveforms = torch.randn(MEL_BATCH, CLIP_SAMPLES) * 0.1
    seconds = []
    for _ in range(NUM_ROUNDS):
        start = time.process_time()
        log_mel(waveforms)
        seconds.append(time.process_time() - start)
    return min(seconds) / MEL_BATCH


if __name__ == "__main__":
    main()
