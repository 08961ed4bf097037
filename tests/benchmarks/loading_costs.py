"""Costs of the loader other than CPU seconds: reads, exactness, order, resuming, memory.

    python -m tests.benchmarks.loading_costs

Read amplification is the bytes read from files in one epoch, over the bytes of all members and one
header block each. PSNR compares training pixels with Pillow's bicubic resize of the same crop, in
two orders. Width first is the order of torch, and of Pillow up to version 12. Pillow 13 begins with
the height where that is less work. Both round to 8 bits in between, and clip overshoots. The order
is asked for steps of a source as large as LAION-2B. Memory is that of all of a loader's processes
after each of 20 epochs: RSS, which counts shared memory in each process, and PSS.
"""

from __future__ import annotations

import io
import resource
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from data_prep.shards.dataset import Dataset
from data_prep.shards.index import BLOCK_BYTES
from pretrain.data.step_loader import StepLoader
from pretrain.data.transforms import ImageToPixels
from pretrain.model.tokenizer import build_tokenizer
from pretrain.sampling.keyed_random import sample_random
from pretrain.sampling.order import Segment, SourceOrder, StreamOrder
from pretrain.training.assembly import open_step_loader
from tests.benchmarks.loading.photo_shards import photo_dataset
from tests.benchmarks.loading.process_tree import batches_of, memory
from tests.benchmarks.loading.run_config import image_run
from tests.support.training_rows import training_row

BATCH_SIZE = 128
NUM_WORKERS = 2
SIZES = {256: 4096, 512: 2048, 1024: 1024}  # pixels -> samples, as in image_loading.py
NUM_COMPARED = 200  # pictures of each size
LARGE_SAMPLES, LARGE_SHARDS, LARGE_LANES, LARGE_BATCH = 2_200_000_000, 232_000, 256, 32768
LARGE_STEPS = 20
SMALL_SAMPLES, SMALL_SHARD_SAMPLES, NUM_EPOCHS = 1024, 16, 20


def main() -> None:
    torch.set_num_threads(1)
    show_order()
    for long_side, num_samples in SIZES.items():
        dataset = photo_dataset(long_side, num_samples=num_samples)
        show_exactness(dataset, long_side)
        show_reads(dataset, long_side)
    show_resuming(photo_dataset(256, num_samples=SIZES[256]))
    small = photo_dataset(256, num_samples=SMALL_SAMPLES, samples_per_shard=SMALL_SHARD_SAMPLES)
    show_memory(small)


def step_loader_of(dataset: Path) -> StepLoader:
    config = image_run(dataset, global_batch_size=BATCH_SIZE)
    tokenizer = build_tokenizer(config.model.text)
    return open_step_loader(config, tokenizer, rank=0, world_size=1)


# --------------------------------------------------------------------------------------- order


def show_order() -> None:
    """Prints the cost of looking up a global batch in one source of LARGE_SAMPLES."""
    sizes = np.random.default_rng(0).multinomial(
        LARGE_SAMPLES, np.full(LARGE_SHARDS, 1 / LARGE_SHARDS)
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    source = SourceOrder("pairs", shard_sizes=sizes, lanes=LARGE_LANES, window=32768, seed=0)
    order = StreamOrder(
        "image-text",
        sources=[source],
        segments=[Segment(0, [1.0])],
        global_batch_size=LARGE_BATCH,
        seed=0,
    )
    order.samples_of_step(0, lanes=range(LARGE_LANES))
    first = time.process_time() - start
    seconds = []
    for step in range(1, LARGE_STEPS):
        start = time.process_time()
        order.samples_of_step(step, lanes=range(LARGE_LANES))
        seconds.append(time.process_time() - start)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"order of {LARGE_SAMPLES:,} samples in {LARGE_SHARDS:,} shards, {LARGE_BATCH} a step: "
        f"{min(seconds) / LARGE_BATCH * 1e6:.2f} us per sample (mean "
        f"{np.mean(seconds) / LARGE_BATCH * 1e6:.2f}), first step {first:.2f} s, "
        f"{held / 1024:.0f} MB more at the peak"
    )


# --------------------------------------------------------------------------------------- pixels


def show_exactness(dataset: Path, long_side: int) -> None:
    """Prints the PSNR of training pixels against Pillow's of the same crop."""
    config = image_run(dataset, global_batch_size=BATCH_SIZE).image
    transform, samples = ImageToPixels(config), Dataset(dataset)
    ratios = []
    for ordinal in range(NUM_COMPARED):
        jpeg = samples.read_sample(ordinal).members["jpg"]
        numbers = {"source": "photographs", "epoch": 0, "ordinal": ordinal, "view": "image"}
        found = training_row(transform, jpeg, "jpg", sample_random(0, **numbers))[0].numpy()
        picture = Image.open(io.BytesIO(jpeg))
        # The same numbers give the same crop.
        crop = transform._random_crop(*picture.size[::-1], sample_random(0, **numbers))
        expected = with_pillow(picture, crop, size=config.size)
        ratios.append([psnr(found, each) for each in expected])
    least, mean = np.min(ratios, axis=0), np.mean(ratios, axis=0)
    print(
        f"{long_side} pixels, compared with Pillow, width first: at least {least[0]:.1f} dB, on "
        f"average {mean[0]:.1f} dB; in the order that it takes: {least[1]:.1f} and {mean[1]:.1f} dB"
    )


def with_pillow(
    picture: Image.Image, crop: tuple[int, int, int, int], *, size: int
) -> list[np.ndarray]:
    """Returns two uint8 [size, size, 3]: width first, and in the order that Pillow takes."""
    top, left, height, width = crop
    part = picture.crop((left, top, left + width, top + height))
    narrowed = part.resize((size, height), Image.Resampling.BICUBIC)
    return [
        np.asarray(each.resize((size, size), Image.Resampling.BICUBIC)) for each in (narrowed, part)
    ]


def psnr(found: np.ndarray, expected: np.ndarray) -> float:
    """Returns the PSNR in dB; infinite if all is equal."""
    error = np.mean((found.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else np.inf


# ---------------------------------------------------------------------------------------- reads


def show_reads(dataset: Path, long_side: int) -> None:
    """Prints the bytes read in the second epoch; in the first, files are opened."""
    loader = step_loader_of(dataset)
    num_steps = loader.schedule.num_samples // BATCH_SIZE
    for step in range(num_steps):
        loader.load(step)
    before = psutil.Process().io_counters().read_chars
    for step in range(num_steps, 2 * num_steps):
        loader.load(step)
    num_read = psutil.Process().io_counters().read_chars - before
    samples = Dataset(dataset)
    members = [samples.read_sample(ordinal).members for ordinal in range(len(samples))]
    least = sum(BLOCK_BYTES + len(content) for each in members for content in each.values())
    print(
        f"{long_side} pixels: {num_read:,} bytes read in an epoch of {len(samples):,} samples, "
        f"{num_read / least:.3f} times those of the members and their headers, "
        f"{num_read / samples.info.tar_bytes:.3f} times those of the shards"
    )


# ------------------------------------------------------------------------------------- resuming


def show_resuming(dataset: Path) -> None:
    for first_step in (0, 1_000_000):
        start = time.monotonic()
        step_loader_of(dataset).load(first_step)
        seconds = time.monotonic() - start
        print(f"dataset opened and step {first_step:,} loaded: {seconds:.2f} s")


# --------------------------------------------------------------------------------------- memory


def show_memory(dataset: Path) -> None:
    """Prints the memory of the training process and its descendants after each epoch."""
    steps_per_epoch = SMALL_SAMPLES // BATCH_SIZE
    # An epoch more, so that the loader still runs at the end of the last one that counts.
    num_batches = (NUM_EPOCHS + 1) * steps_per_epoch
    arguments = (dataset, BATCH_SIZE, num_batches, NUM_WORKERS, 0)
    batches = batches_of(sys.executable, "tests.benchmarks.loading.isopair_batches", *arguments)
    held = [
        memory(pid)
        for number, pid in enumerate(batches, start=1)
        if number % steps_per_epoch == 0 and number < num_batches
    ]
    for name, column in zip(("RSS", "PSS"), np.array(held).T, strict=True):
        megabytes = " ".join(f"{each / 1e6:.0f}" for each in column)
        print(f"{name} in MB after each of {NUM_EPOCHS} epochs: {megabytes}")


if __name__ == "__main__":
    main()
