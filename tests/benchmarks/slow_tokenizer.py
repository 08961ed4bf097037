"""Loading with a slow tokenizer: our threads next to processes of torch's DataLoader.

    python -m tests.benchmarks.slow_tokenizer [ROUNDS]

The tokenizer is transformers' PhoBERT, written in Python, with a vocabulary of letters: about
0.34 ms per caption. Pictures have 256 pixels. The two take turns, the first of a round going second
in the next one. A turn begins when the other has loaded all that it may load ahead, and times
batches of 128 beyond its own. On a shared machine, only ratios within a round mean something.
"""

from __future__ import annotations

import string
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from torch.utils.data import DataLoader
from transformers import PhobertTokenizer

from pretrain.config import PretrainConfig
from pretrain.data.batch import StepBatch
from pretrain.data.loader_process import LoaderProcess
from pretrain.data.step_loader import StepLoader
from pretrain.model.tokenizer import build_tokenizer
from pretrain.training.assembly import open_step_loader
from tests.benchmarks.loading.photo_shards import photo_dataset
from tests.benchmarks.loading.run_config import image_run

BATCH_SIZE, NUM_WORKERS = 128, 2
SKIPPED_BATCHES, TIMED_BATCHES = 6, 8  # processes load four ahead, threads two
REFILL_SECONDS = 6  # in which a loader whose turn has ended comes to rest
NUM_STEPS = 10**6


def main(num_rounds: int) -> None:
    """Prints samples per second of both ways in every round, and the median ratio."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_with_tokenizer(write_tokenizer(Path(folder)))
        tokenizer = build_tokenizer(config.model.text)
    assert tokenizer.is_slow
    process = LoaderProcess(config.loading)
    loader = open_step_loader(config, tokenizer, rank=0, world_size=1)
    ways = {
        "processes": in_processes(loader),
        "threads": process.load(loader, first_step=0, last_step=NUM_STEPS, is_pinned=False),
    }
    ratios = []
    for number in range(num_rounds):
        names = sorted(ways, reverse=number % 2 == 0)
        rates = {name: samples_per_second(ways[name]) for name in names}
        ratios.append(rates["threads"] / rates["processes"])
        print(number, {name: round(rate) for name, rate in rates.items()}, flush=True)
    print(f"threads over processes: {median(ratios):.2f}")
    process.close()


def write_tokenizer(folder: Path) -> Path:
    """Writes a PhoBERT tokenizer whose vocabulary is the alphabet."""
    pieces = [letter + end for end in ("@@", "") for letter in string.ascii_lowercase]
    (folder / "vocab.txt").write_text("".join(f"{piece} 1\n" for piece in pieces))
    (folder / "bpe.codes").write_text("a b 1\n")
    tokenizer = PhobertTokenizer(str(folder / "vocab.txt"), str(folder / "bpe.codes"))
    tokenizer.save_pretrained(str(folder))
    return folder


def config_with_tokenizer(folder: Path) -> PretrainConfig:
    """Returns the config of an image run with a tokenizer from a folder."""
    dataset = photo_dataset(256, num_samples=1024)
    config = image_run(dataset, global_batch_size=BATCH_SIZE, num_workers=NUM_WORKERS)
    text = {"library": "transformers", "name": "bert-base-uncased", "tokenizer": str(folder)}
    values = config.model_dump()
    values["model"]["text"] |= text
    return PretrainConfig.model_validate(values)


class Steps:
    """A dataset for torch's DataLoader, whose item t is step t."""

    def __init__(self, loader: StepLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return NUM_STEPS

    def __getitem__(self, step: int) -> StepBatch:
        return self.loader.load(step)


def in_processes(loader: StepLoader) -> Iterator[StepBatch]:
    """Loads whole steps in worker processes."""
    batches = DataLoader(
        Steps(loader),
        batch_size=None,
        sampler=range(NUM_STEPS),
        num_workers=NUM_WORKERS,
        prefetch_factor=2,
        collate_fn=lambda batch: batch,
        worker_init_fn=lambda worker: torch.set_num_threads(1),
        multiprocessing_context="fork",
    )
    return iter(batches)


def samples_per_second(batches: Iterator[StepBatch]) -> float:
    """Measures some batches, after those that were loaded ahead."""
    time.sleep(REFILL_SECONDS)
    for _ in range(SKIPPED_BATCHES):
        next(batches)
    start = time.monotonic()
    for _ in range(TIMED_BATCHES):
        next(batches)
    return TIMED_BATCHES * BATCH_SIZE / (time.monotonic() - start)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 14)
