"""Tiny real media with manifests, and short ways to run data_prep on them, for its tests."""

import io
import json
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image

from data_prep.config import MakeShards, VerifyShards
from data_prep.make_shards import make_shards
from data_prep.verify_shards import verify_shards


def picture_bytes(number: int, image_format: str = "JPEG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (20 + number % 5, 16, 3))
    sink = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(sink, image_format)
    return sink.getvalue()


def sound_bytes(number: int, sound_format: str = "WAV", subtype: str | None = None) -> bytes:
    tone = 0.5 * np.sin(np.arange(1600 + number) * (0.05 + 0.001 * number))
    sink = io.BytesIO()
    soundfile.write(sink, tone, 8000, format=sound_format, subtype=subtype)
    return sink.getvalue()


def write_tsv(path: Path, rows: list[tuple], header: tuple = ("path", "caption")) -> Path:
    lines = ["\t".join(row) for row in [header, *rows]]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_pictures(folder: Path, number: int) -> Path:
    """Writes `number` JPEGs and their manifest, every third with two captions."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for each in range(number):
        name = f"picture_{each}.jpg"
        (folder / name).write_bytes(picture_bytes(each))
        rows += [(name, f"caption {each}")] + [(name, f"other {each}")] * (each % 3 == 0)
    return write_tsv(folder / "pairs.tsv", rows)


def shard(manifest: Path, output: Path, **fields) -> Path:
    """Makes a dataset of pictures, by default with three samples per shard."""
    fields = {"media": "image", "samples_per_shard": 3} | fields
    make_shards(MakeShards(input=str(manifest), output=output, **fields))
    return output


def verify(dataset: Path, *, decode: bool = False) -> None:
    verify_shards(VerifyShards(dataset=dataset, decode=decode))


def contents(folder: Path) -> dict[str, bytes]:
    """Returns path -> bytes of every file in a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def rejected_rows(dataset: Path) -> list[dict]:
    return [json.loads(line) for line in (dataset / "rejected.jsonl").read_text().splitlines()]
