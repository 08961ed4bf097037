"""Tiny real datasets and a tiny config, for tests of training."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from data_prep.shards.manifest import (
    DatasetInfo,
    fingerprint_of,
    manifest_row,
    write_dataset_files,
)
from data_prep.shards.writer import ShardWriter
from pretrain.config import PretrainConfig

COLORS = ("red", "green", "blue", "white")


def write_toy_dataset(
    folder: Path,
    media: str,
    *,
    shard_sizes: tuple[int, ...],
    members_of: Callable[[int], dict[str, bytes]] | None = None,
) -> Path:
    """Writes PNGs of one colour or WAVs of one pitch, with one caption; every fourth has two.

    Args:
        members_of: returns the members of a sample instead, from its number.
    """
    folder.mkdir(parents=True)
    rows, number = [], 0
    members_of = members_of or (lambda number: toy_members(media, number))
    for shard, size in enumerate(shard_sizes):
        writer = ShardWriter(folder, f"{shard:08d}")
        for _ in range(size):
            writer.add(f"{number:06d}", members=members_of(number))
            number += 1
        writer.finish()
        rows.append(manifest_row(folder, f"{shard:08d}"))
    info = DatasetInfo(
        media=media,
        fields=sorted({field for each in range(number) for field in members_of(each)}),
        num_samples=number,
        num_shards=len(rows),
        tar_bytes=sum(row.tar_bytes for row in rows),
        fingerprint=fingerprint_of(rows),
    )
    write_dataset_files(folder, info, manifest=rows)
    return folder


def toy_members(media: str, number: int) -> dict[str, bytes]:
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    if media == "image":
        level = 100 + number % 100
        color = [level * (number % 4 in (channel, 3)) for channel in range(3)]
        pixels = np.full((12, 10, 3), color, dtype=np.uint8) + rng.integers(0, 50, (12, 10, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "PNG")
        caption = f"picture {number} is {COLORS[number % 4]}"
    else:
        times = np.arange(1500 + 10 * (number % 50)) / 4000
        tone = 0.5 * np.sin(2 * np.pi * (200 + 40 * (number % 40)) * times)
        soundfile.write(buffer, tone.astype(np.float32), 4000, format="WAV")
        caption = f"sound {number} of {200 + 40 * (number % 40)} hertz"
    members = {"png" if media == "image" else "wav": buffer.getvalue(), "txt": caption.encode()}
    if number % 4 == 0:
        captions = [caption, f"also number {number}"]
        members["json"] = json.dumps({"captions": captions}).encode()
    return members


def toy_config(data: Path, run: Path, /, **sections) -> PretrainConfig:
    """Returns a three-modality config with a few thousand parameters outside the vocabulary.

    `sections` replace values: {"schedule": {"num_steps": 3}} changes only that key.
    """
    tower = {"library": "timm", "name": "test_convnext", "options": {"patch_size": 1}}
    values = {
        "lanes": 8,
        "micro_batch_size": 64,
        "run": {"folder": run, "log_every_steps": 1, "checkpoint_every_steps": 100},
        "model": {
            "embed_dim": 16,
            "image": tower,
            "audio": tower,
            "text": {
                "library": "open_clip",
                "context_length": 12,
                "options": {"width": 32, "heads": 2, "layers": 1, "vocab_size": 49408},
            },
        },
        "image": {"size": 16, "crop_area": (0.5, 1.0), "flip_probability": 0.5},
        "audio": {
            "sample_rate_hz": 4000,
            "clip_seconds": 0.4,
            "log_mel": {
                "fft_samples": 128,
                "hop_samples": 64,
                "num_mel_bins": 16,
                "high_hz": 2000.0,
            },
        },
        "streams": {
            "image-text": {
                "global_batch_size": 16,
                "objectives": {"image-text": {}},
                "sources": [
                    {"name": "colors", "dataset": data / "colors", "weight": 3},
                    {"name": "more_colors", "dataset": data / "more_colors", "weight": 1},
                ],
            },
            "audio-text": {
                "global_batch_size": 8,
                "objectives": {"audio-text": {}},
                "sources": [{"name": "tones", "dataset": data / "tones"}],
            },
        },
        "loading": {"num_workers": 0, "window": 16},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"num_steps": 6, "warmup_steps": 2},
        "engine": {
            "precision": "fp32",
            "device": "cpu",
            "timeout_seconds": 600,
            "start_timeout_seconds": 600,
        },
    }
    for section, changes in sections.items():
        is_section = isinstance(values.get(section), dict) and isinstance(changes, dict)
        values[section] = values[section] | changes if is_section else changes
    return PretrainConfig.model_validate(values)


def write_toy_data(folder: Path) -> Path:
    """Writes the three sources that `toy_config` reads."""
    write_toy_dataset(folder / "colors", "image", shard_sizes=(40, 13, 30))
    write_toy_dataset(folder / "more_colors", "image", shard_sizes=(25,))
    write_toy_dataset(folder / "tones", "audio", shard_sizes=(30, 20))
    return folder
