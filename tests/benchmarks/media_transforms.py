"""Bytes to rows of a training batch, in microseconds of one thread's CPU time each (median).

python -m tests.benchmarks.media_transforms

Pictures are compared with Pillow (decode, crop, bicubic resize), and clips of 10 s out of 60 s with
decoding the whole clip before cropping. All are synthetic: smooth blobs under noise, brown noise.
"""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import soundfile
import torch
from PIL import Image

from data_prep.media.decode import decode_audio
from pretrain.data.transforms import AudioToWaveform, ImageToPixels
from pretrain.sampling.keyed_random import SampleRandom, sample_random
from pretrain.settings.transforms import AudioTransform, ImageTransform
from tests.support.training_rows import training_row

PICTURES = ((256, 256, 95), (384, 512, 90), (768, 1024, 85))  # height, width, JPEG quality
SOUNDS = (
    ("FLAC", "PCM_16", 48000, 1),
    ("FLAC", "PCM_16", 44100, 2),
    ("WAV", "PCM_16", 48000, 1),
    ("OGG", "OPUS", 48000, 1),
    ("OGG", "VORBIS", 48000, 1),
    ("MP3", "MPEG_LAYER_III", 48000, 1),
)
CLIP_SECONDS, WHOLE_SECONDS = 10, 60
TRANSFORMS = {
    "ours": ImageTransform(),
    "scaled decoding": ImageTransform(scaled_decoding=True),
    "colour jitter": ImageTransform(color_jitter={"probability": 1}),
}


def main() -> None:
    torch.set_num_threads(1)
    for height, width, quality in PICTURES:
        content = jpeg(height, width, quality)
        times = {
            name: microseconds(partial(training_row, ImageToPixels(config), content, "jpg"))
            for name, config in TRANSFORMS.items()
        }
        times["Pillow"] = microseconds(partial(by_pillow, content))
        print(f"{width} x {height}, {len(content) / 1000:.0f} kB: {described(times)}")
    transform = AudioToWaveform(AudioTransform(clip_seconds=CLIP_SECONDS))
    for sound_format, subtype, rate, channels in SOUNDS:
        content = sound(sound_format, subtype, rate, channels)
        times = {
            "ours": microseconds(partial(training_row, transform, content, ""), 15),
            "whole": microseconds(partial(decoded_whole, content), 7),
        }
        print(f"{sound_format}, {subtype}, {rate} Hz, {channels} channels: {described(times)}")


def described(times: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.0f} us" for name, value in times.items())


def microseconds(load: Callable[[SampleRandom], object], num_runs: int = 60) -> float:
    times = []
    for ordinal in range(num_runs):
        rng = sample_random(0, source="a", epoch=0, ordinal=ordinal, view="image")
        start = time.thread_time()
        load(rng)
        times.append(time.thread_time() - start)
    return 1e6 * statistics.median(times)


def by_pillow(content: bytes, rng: SampleRandom) -> np.ndarray:
    config = ImageTransform()
    image = Image.open(io.BytesIO(content)).convert("RGB")
    top, left, height, width = ImageToPixels(config)._random_crop(image.height, image.width, rng)
    image = image.crop((left, top, left + width, top + height))
    return np.asarray(image.resize((config.size, config.size), Image.Resampling.BICUBIC))


def decoded_whole(content: bytes, rng: SampleRandom) -> np.ndarray:
    waveform = decode_audio(content, sample_rate_hz=48000)
    start = rng.below(len(waveform) - CLIP_SECONDS * 48000 + 1)
    return waveform[start : start + CLIP_SECONDS * 48000]


def jpeg(height: int, width: int, quality: int) -> bytes:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels += rng.integers(-5, 6, (height, width, 1))
    sink = io.BytesIO()
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    picture.save(sink, "JPEG", quality=quality)
    return sink.getvalue()


def sound(sound_format: str, subtype: str, rate: int, channels: int) -> bytes:
    steps = np.random.default_rng(0).standard_normal((rate * WHOLE_SECONDS, channels))
    clip = np.cumsum(steps, axis=0)
    clip = 0.9 * clip / np.abs(clip).max()
    sink = io.BytesIO()
    with soundfile.SoundFile(sink, "w", rate, channels, subtype, format=sound_format) as file:
        for second in np.array_split(clip, WHOLE_SECONDS):  # Opus fails on long writes
            file.write(second)
    return sink.getvalue()


if __name__ == "__main__":
    main()
