"""Tiny datasets written by ShardWriter itself, for tests of what reads and checks shards."""

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow
from PIL import Image

from data_prep.shards.columns import shard_schema
from data_prep.shards.folder import finish_dataset
from data_prep.shards.manifest import manifest_row, read_dataset_files, write_dataset_files
from data_prep.shards.parquet import write_shard_parquet
from data_prep.shards.sample import (
    Sample,
    captions_of,
)
from data_prep.shards.writer import ShardWriter


def jpeg(number: int) -> bytes:
    """Draws a different picture for each number."""
    pixels = np.random.default_rng(number).integers(0, 255, (20 + number % 5, 16, 3))
    sink = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(sink, "JPEG")
    return sink.getvalue()


def toy_sample(number: int) -> tuple[str, dict[str, bytes]]:
    """Returns (key, members) of a sample; every third has a .json."""
    members = {"jpg": jpeg(number), "txt": f"caption {number}".encode()}
    if number % 3 == 0:
        members["json"] = f'{{"captions": ["caption {number}", "other {number}"]}}'.encode()
    return f"{number:012d}", members


def write_toy_dataset(
    folder: Path,
    *,
    num_samples: int = 8,
    samples_per_shard: int = 3,
    has_parquet: bool = True,
    preparation: dict | None = None,
) -> Path:
    """Writes a finished dataset of pictures, with a rejected pair in every shard."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for start in range(0, num_samples, samples_per_shard):
        numbers = range(start, min(start + samples_per_shard, num_samples))
        names.append(f"{len(names):08d}")
        writer = ShardWriter(folder, names[-1])
        for number in numbers:
            key, members = toy_sample(number)
            writer.add(key, members=members)
        if has_parquet:
            write_rows(folder / f"{names[-1]}.parquet", numbers)
        writer.finish(rejected={"empty_caption": len(names)}, marked={"image_too_small": 1})
    finish_dataset(folder, names, media="image", preparation=preparation or {})
    return folder


def write_rows(path: Path, numbers: range) -> None:
    """Writes the Parquet file of some samples, with a column that a user kept."""
    rows = []
    for number in numbers:
        key, members = toy_sample(number)
        rows.append(
            {
                "key": key,
                "uid": f"u{number}",
                "captions": captions_of(Sample(shard="", key=key, members=members)),
                "marks": ["image_too_small"] if number == numbers[0] else [],
                "extension": "jpg",
                "bytes": len(members["jpg"]),
                "sha256": hashlib.sha256(members["jpg"]).hexdigest(),
                "height": 20 + number % 5,
                "width": 16,
                "source": f"picture_{number}.jpg",
                "source_row": number + 1,
                "licence": "cc0",
            }
        )
    schema = shard_schema("image", kept={"licence": "string"})
    write_shard_parquet(path, pyarrow.Table.from_pylist(rows, schema=schema))


def record_sidecars(folder: Path) -> None:
    """Writes the manifest again after a test has replaced Parquet files."""
    info, manifest = read_dataset_files(folder)
    write_dataset_files(folder, info, manifest=[manifest_row(folder, row.name) for row in manifest])
