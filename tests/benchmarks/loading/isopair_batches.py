"""Prints a line for every batch that our loader gives.

python -m tests.benchmarks.loading.isopair_batches DATASET BATCH_SIZE BATCHES WORKERS FIRST_STEP
"""

from __future__ import annotations

import sys
from pathlib import Path

from pretrain.data.loaders import start_loader
from pretrain.model.tokenizer import build_tokenizer
from pretrain.training.assembly import open_step_loader
from tests.benchmarks.loading.run_config import image_run


def main(dataset: str, *settings: str) -> None:
    batch_size, num_batches, num_workers = map(int, settings[:3])
    config = image_run(
        Path(dataset),
        global_batch_size=batch_size,
        num_workers=num_workers,
    )
    first_step = int(settings[3])
    tokenizer = build_tokenizer(config.model.text)
    with start_loader(config.loading) as load_steps:
        steps = load_steps(
            open_step_loader(config, tokenizer, rank=0, world_size=1),
            first_step=first_step,
            last_step=config.schedule.num_steps,
        )
        for _, batch in zip(range(num_batches), steps, strict=False):
            assert len(batch.streams["image-text"]) == batch_size
            print("batch", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
