"""Tiny datasets of coloured images and sines, and a model that recognises colours and pitches."""

import io
import json

import numpy as np
import soundfile
import torch
from PIL import Image
from torch.nn.functional import normalize

from data_prep.media.decode import decode_audio, decode_image
from data_prep.shards.manifest import (
    DatasetInfo,
    fingerprint_of,
    manifest_row,
    write_dataset_files,
)
from data_prep.shards.writer import ShardWriter
from pretrain.checkpoints.record import CheckpointRecord, RunState

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
PITCHES_HZ = {"low": 200, "middle": 600, "high": 1500}
SAMPLE_RATE_HZ = 8000
WRITTEN_BY = {"attempt": "0001"}  # required in checkpoint.json


def write_dataset(folder, samples, *, media="image"):
    """Writes a dataset of one shard; each sample maps extensions to contents."""
    folder.mkdir(parents=True)
    writer = ShardWriter(folder, "00000000")
    for number, members in enumerate(samples):
        writer.add(f"{number:04d}", members=members)
    index = writer.finish()
    manifest = [manifest_row(folder, "00000000")]
    info = DatasetInfo(
        media=media,
        fields=list(index.fields),
        num_samples=index.num_samples,
        num_shards=1,
        tar_bytes=index.tar_bytes,
        fingerprint=fingerprint_of(manifest),
    )
    write_dataset_files(folder, info, manifest=manifest)
    return folder


def picture_sample(color, *, seed):
    """Draws an image of a colour with noise; returns its members, with class and two captions."""
    noise = np.random.default_rng(seed).integers(-30, 30, (24, 32, 3))
    pixels = (np.array(COLORS[color]) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    captions = [f"a {color} picture", f"a painting in {color} <{seed}>"]
    metadata = {"class_name": color, "captions": captions}
    return {"png": file.getvalue(), "json": json.dumps(metadata).encode()}


def sound_sample(pitch, *, seed):
    """Synthesizes a sine in noise; returns its members, with class and caption."""
    generator = np.random.default_rng(seed)
    time = np.arange(SAMPLE_RATE_HZ // 2) / SAMPLE_RATE_HZ
    waveform = 0.5 * np.sin(2 * np.pi * PITCHES_HZ[pitch] * time)
    waveform += 0.05 * generator.standard_normal(len(time))
    file = io.BytesIO()
    soundfile.write(file, waveform, SAMPLE_RATE_HZ, format="WAV")
    metadata = {"class_name": pitch, "captions": [f"a {pitch} tone"]}
    return {"wav": file.getvalue(), "json": json.dumps(metadata).encode()}


class ToyModel(torch.nn.Module):
    """Model with six dimensions: three colours, three pitches."""

    kinds = {"image": "image", "audio": "audio", "text": "text"}

    def encode(self, modality, inputs):
        encode = {"text": self.encode_text}.get(modality)
        return encode(inputs) if encode else self.encode_media(modality, inputs)

    def encode_media(self, kind, batch):
        if kind == "image":
            means = batch.float().mean(dim=(-2, -1))  # [B, 3, H, Wd] -> [B, 3]
            return normalize(torch.nn.functional.pad(means, (0, 3)), dim=-1)
        spectrum = torch.fft.rfft(batch).abs()  # [B, samples] -> [B, bins]
        bins = [hz * batch.shape[-1] // SAMPLE_RATE_HZ for hz in PITCHES_HZ.values()]
        return normalize(torch.nn.functional.pad(spectrum[:, bins], (3, 0)), dim=-1)

    def encode_text(self, tokens):
        rows = []
        for row in tokens.tolist():
            text = "".join(map(chr, row))
            rows.append([float(word in text) for word in [*COLORS, *PITCHES_HZ]])
        return normalize(torch.tensor(rows) + 0.01, dim=-1)


class ToySettings:
    def model_dump(self, mode):
        return {}


class ToyImageTransform:
    config = ToySettings()

    def decode(self, content, extension):
        return decode_image(content, extension)

    def __call__(self, image):
        return torch.from_numpy(image.copy()).permute(2, 0, 1)


class ToyAudioTransform:
    config = ToySettings()
    clip_samples = SAMPLE_RATE_HZ // 2

    def decode(self, content, extension):
        return decode_audio(content, sample_rate_hz=SAMPLE_RATE_HZ)

    def __call__(self, waveform):
        return torch.from_numpy(waveform)


def toy_tokenizer(texts):
    tokens = torch.zeros(len(texts), 64, dtype=torch.int64)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = torch.tensor([ord(letter) for letter in text])
    return tokens


def load_toy_model(folder, *, device="cpu", weights="plain"):
    """Replaces pretrain.checkpoint.load_model."""
    transforms = {"image": ToyImageTransform(), "audio": ToyAudioTransform()}
    return ToyModel().eval(), transforms, toy_tokenizer


def write_toy_run(folder, *, num_steps=40):
    """Writes a run folder with metrics, and a checkpoint that records only its step."""
    checkpoint = folder / "checkpoints" / f"step_{num_steps:08d}"
    checkpoint.mkdir(parents=True)
    record = CheckpointRecord(RunState(num_steps, num_steps), WRITTEN_BY, shapes={}, files={})
    (checkpoint / "checkpoint.json").write_bytes(record.to_json())
    rows = []
    for step in range(1, num_steps + 1):
        rows.append(
            {
                "step": step,
                "loss": {"image-text": 3 / step, "audio-text": 4 / step},
                "logit_scale": {"image-text": 14.3 + step, "audio-text": 14.3},
                "learning_rate": 1e-3 * (1 - step / num_steps),
            }
        )
        if step % 10 == 0:
            recalls = {"loss": 2.0}
            recalls |= {"image_to_text_recall@1": step / 50, "text_to_image_recall@1": step / 60}
            rows.append({"step": step, "validation": {"image-text/image-text": recalls}})
    (folder / "metrics").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics" / "0001.jsonl").write_text(lines)
    return folder
