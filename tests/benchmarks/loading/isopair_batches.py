"""Prints a line for every batch that our loader gives.

python -m loading.isopair_batches DATASET BATCH_SIZE BATCHES WORKERS RUNTIME
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from loading.run_config import image_run

from pretrain.config import PretrainConfig
from pretrain.pair_batch import StepBatch
from pretrain.pair_loader import StepDataset, load_steps
from pretrain.tokenizer import build_tokenizer


def main(dataset: str, *numbers: str) -> None:
    batch_size, num_batches, num_workers = map(int, numbers[:3])
    config = image_run(
        Path(dataset),
        global_batch_size=batch_size,
        num_workers=num_workers,
        runtime=numbers[3],
    )
    for batch in islice(endless_steps(config), num_batches):
        assert len(batch.pairings["image-text"].media) == batch_size
        print("batch", flush=True)


def endless_steps(config: PretrainConfig, *, first_step: int = 0) -> Iterator[StepBatch]:
    """The steps of the only process of a run."""
    tokenizer = build_tokenizer(config.model.text)
    dataset = StepDataset(config, tokenizer=tokenizer, rank=0, world_size=1)
    return load_steps(
        dataset,
        first_step=first_step,
        last_step=config.schedule.num_steps,
        num_workers=config.loading.num_workers,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
