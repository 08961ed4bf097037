"""Loading images for training, compared with open_clip's loader: samples per CPU second.

    python -m tests.benchmarks.image_loading [RUNS]

Both read the same shards, written by us: JPEGs of 256, 512 and 1024 pixels. Both crop 0.9 to 1 of
the area, resize to 224 pixels (bicubic) and tokenise the caption. open_clip's batches are float32
and normalised; ours are uint8, and normalised on the device. open_clip 3.3 needs webdataset 0.2.86,
so it gets its own environment, kept in the system's temporary folder. CPU seconds are those of all
processes of a loader, over whole passes over the shards. The median of several runs counts.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

import torch

from pretrain.settings.transforms import CLIP_MEAN, CLIP_STD
from tests.benchmarks.loading.peer_environment import peer_python
from tests.benchmarks.loading.photo_shards import photo_dataset
from tests.benchmarks.loading.process_tree import Cost, stream_cost

BATCH_SIZE = 128
NUM_WORKERS = 2
SKIPPED_BATCHES = 4
# Pixels of the longer side -> (samples in the dataset, batches counted: one or two passes).
SIZES = {256: (4096, 32), 512: (2048, 16), 1024: (1024, 16)}
PEER = ["open_clip_torch==3.3.0", "webdataset==0.2.86", "pandas", "fsspec"]


def main(num_runs: int) -> None:
    open_clip_python = peer_python("open_clip-3.3.0", PEER)
    print(f"normalising on the CPU would add {normalising_seconds() * 1e6:.0f} us per sample")
    for long_side, (num_samples, num_batches) in SIZES.items():
        dataset = photo_dataset(long_side, num_samples=num_samples)
        costs: dict[str, list[Cost]] = {}
        for _ in range(num_runs):
            for name, command in commands(open_clip_python, dataset, num_batches).items():
                cost = stream_cost(*command, skipped=SKIPPED_BATCHES, counted=num_batches)
                costs.setdefault(name, []).append(cost)
        show(long_side, costs, num_samples=num_batches * BATCH_SIZE)


def commands(
    open_clip_python: Path, dataset: Path, num_batches: int
) -> dict[str, tuple[object, ...]]:
    """Returns name of a loader -> interpreter, module and arguments."""
    numbers = (dataset, BATCH_SIZE, SKIPPED_BATCHES + num_batches, NUM_WORKERS)
    peer = (open_clip_python, "tests.benchmarks.loading.open_clip_batches", *numbers)
    ours = (sys.executable, "tests.benchmarks.loading.isopair_batches", *numbers)
    return {"open_clip": peer, "isopair": (*ours, 0)}


def show(long_side: int, costs: dict[str, list[Cost]], *, num_samples: int) -> None:
    """Prints a line for each loader: its rates, and their ratio to open_clip's."""
    theirs = median(cost.cpu_seconds for cost in costs["open_clip"])
    for name, runs in costs.items():
        cpu, wall, first = (
            median(getattr(run, field) for run in runs)
            for field in ("cpu_seconds", "wall_seconds", "first_batch_seconds")
        )
        rates = " ".join(f"{num_samples / run.cpu_seconds:,.0f}" for run in runs)
        print(
            f"{long_side} pixels, {name}: {num_samples / cpu:,.0f} samples per CPU second "
            f"({theirs / cpu:.2f} times; runs {rates}), {num_samples / wall:,.0f} per second, "
            f"first batch after {first:.1f} s",
            flush=True,
        )


def normalising_seconds(num_batches: int = 5) -> float:
    """Measures CPU seconds per sample of uint8 -> normalised float32, done without a device."""
    torch.set_num_threads(1)
    mean = torch.tensor(CLIP_MEAN).view(3, 1, 1) * 255
    std = torch.tensor(CLIP_STD).view(3, 1, 1) * 255
    images = torch.zeros(BATCH_SIZE, 3, 224, 224, dtype=torch.uint8)
    seconds = []
    for _ in range(num_batches):
        start = time.process_time()
        images.float().sub_(mean).div_(std)
        seconds.append(time.process_time() - start)
    return min(seconds) / BATCH_SIZE


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
