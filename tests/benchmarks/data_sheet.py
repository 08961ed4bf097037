"""A data sheet of a million samples: seconds and peak memory.

    python -m tests.benchmarks.data_sheet

The samples are tiny images with captions of 3 to 20 invented words and random measures.
"""

from __future__ import annotations

import hashlib
import io
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

from data_prep.config import Describe
from data_prep.describe import describe
from data_prep.shards.columns import shard_schema
from data_prep.shards.manifest import (
    DatasetInfo,
    ManifestRow,
    fingerprint_of,
    manifest_row,
    write_dataset_files,
)
from data_prep.shards.writer import ShardWriter

NUM_SHARDS = 100
SAMPLES_PER_SHARD = 10_000
NUM_WORDS = 50_000


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "million"
        folder.mkdir()
        write_dataset(folder)
        before = peak_megabytes()
        start, cpu = time.perf_counter(), time.process_time()
        describe(Describe(dataset=folder, output=Path(name) / "sheet.html", workers=2))
        print(
            f"{time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} CPU s, "
            f"{peak_megabytes():,.0f} MB at most ({before:,.0f} MB before)"
        )


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


def write_dataset(folder: Path) -> None:
    rng = np.random.default_rng(0)
    words = np.array([f"w{number:x}" for number in range(NUM_WORDS)])
    chances = 1 / np.arange(1, NUM_WORDS + 1)
    sink = io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(sink, "JPEG")
    manifest = []
    for shard in range(NUM_SHARDS):
        lengths = rng.integers(3, 21, SAMPLES_PER_SHARD)
        drawn = rng.choice(words, size=lengths.sum(), p=chances / chances.sum())
        words_of_captions = np.split(drawn, np.cumsum(lengths)[:-1])
        captions = [" ".join(each) for each in words_of_captions]
        manifest.append(write_shard(folder, shard, captions, picture=sink.getvalue(), rng=rng))
    info = DatasetInfo(
        media="image",
        fields=["jpg", "txt"],
        num_samples=NUM_SHARDS * SAMPLES_PER_SHARD,
        num_shards=NUM_SHARDS,
        tar_bytes=sum(row.tar_bytes for row in manifest),
        fingerprint=fingerprint_of(manifest),
    )
    write_dataset_files(folder, info, manifest=manifest)


def write_shard(
    folder: Path, shard: int, captions: list[str], *, picture: bytes, rng: np.random.Generator
) -> ManifestRow:
    writer = ShardWriter(folder, f"{shard:08d}")
    num, schema = len(captions), shard_schema("image", kept={"similarity": "double"})
    keys = [f"{shard * num + index:012d}" for index in range(num)]
    for key, caption in zip(keys, captions, strict=True):
        writer.add(key, members={"jpg": picture, "txt": caption.encode()})
    writer.finish()
    widths = rng.lognormal(6.5, 0.6, num).astype(np.int32) + 16
    hashes = rng.integers(0, 50 * NUM_SHARDS * num, num)
    columns = {
        "key": keys,
        "uid": keys,
        "captions": [[caption] for caption in captions],
        "language": rng.choice(["en", "de", "fr"], num),
        "bytes": widths.astype(np.int64) ** 2 // 7,
        "sha256": [hashlib.sha256(str(value).encode()).hexdigest() for value in hashes],
        "height": rng.permutation(widths),
        "width": widths,
        "similarity": rng.random(num),
    }
    arrays = [
        pyarrow.array(columns[field.name], field.type)
        if field.name in columns
        else pyarrow.nulls(num, field.type)
        for field in schema
    ]
    table = pyarrow.Table.from_arrays(arrays, schema=schema)
    pyarrow.parquet.write_table(table, folder / f"{shard:08d}.parquet", compression="zstd")
    return manifest_row(folder, f"{shard:08d}")


if __name__ == "__main__":
    main()
