"""Shards written and read per CPU second, compared with webdataset (best of three).

    python -m tests.benchmarks.shards

The samples are 30 kB of noise under .jpg with a caption, 3,000 in one shard; nothing is decoded.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import webdataset

from data_prep.shards.dataset import Dataset
from data_prep.shards.manifest import (
    DatasetInfo,
    fingerprint_of,
    manifest_row,
    write_dataset_files,
)
from data_prep.shards.writer import ShardWriter

NUM_SAMPLES = 3000
IMAGE_BYTES = 30_000
NUM_RUNS = 3


def main() -> None:
    rng = np.random.default_rng(0)
    samples = [(f"{n:012d}", rng.bytes(IMAGE_BYTES), b"a caption") for n in range(NUM_SAMPLES)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = rate(lambda: write_with_webdataset(folder, samples))
        ours = rate(lambda: write_with_isopair(folder, samples))
        show("write, with sha256 and index", ours, theirs)
        theirs = rate(lambda: read_with_webdataset(folder / "00000000.tar"))
        dataset = Dataset(folder)
        show(
            "read in order, crc32 checked", rate(lambda: read(dataset, range(NUM_SAMPLES))), theirs
        )
        shuffled = random.Random(0).sample(range(NUM_SAMPLES), NUM_SAMPLES)
        show("read at random, crc32 checked", rate(lambda: read(dataset, shuffled)), theirs)


def rate(action: Callable[[], None]) -> float:
    """Measures samples per CPU second, in the best of NUM_RUNS."""
    seconds = []
    for _ in range(NUM_RUNS):
        start = time.process_time()
        action()
        seconds.append(time.process_time() - start)
    return NUM_SAMPLES / min(seconds)


def show(what: str, ours: float, theirs: float) -> None:
    print(f"{what}: {ours:,.0f}, webdataset {theirs:,.0f}: {ours / theirs:.1f} times")


def write_with_webdataset(folder: Path, samples: list[tuple[str, bytes, bytes]]) -> None:
    pattern = str(folder / "theirs-%06d.tar")
    with webdataset.ShardWriter(pattern, encoder=False, verbose=0) as writer:
        for key, image, caption in samples:
            writer.write({"__key__": key, "jpg": image, "txt": caption})


def write_with_isopair(folder: Path, samples: list[tuple[str, bytes, bytes]]) -> None:
    writer = ShardWriter(folder, "00000000")
    for key, image, caption in samples:
        writer.add(key, members={"jpg": image, "txt": caption})
    writer.finish()
    rows = [manifest_row(folder, "00000000")]
    info = DatasetInfo(
        media="image",
        fields=["jpg", "txt"],
        num_samples=len(samples),
        num_shards=1,
        tar_bytes=rows[0].tar_bytes,
        fingerprint=fingerprint_of(rows),
    )
    write_dataset_files(folder, info, manifest=rows)


def read_with_webdataset(path: Path) -> None:
    assert sum(1 for _ in webdataset.WebDataset(str(path), shardshuffle=False)) == NUM_SAMPLES


def read(dataset: Dataset, ordinals: range | list[int]) -> None:
    for ordinal in ordinals:
        dataset.read_sample(ordinal)


if __name__ == "__main__":
    main()
