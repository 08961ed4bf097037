"""Prints a line for every batch that open_clip's own training loader gives.

    python -m tests.benchmarks.loading.open_clip_batches DATASET BATCH_SIZE BATCHES WORKERS

Runs in an environment with webdataset 0.2.86, without our packages. One long epoch is asked
for, so that the buffer of shuffled samples is filled only once.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from itertools import islice
from pathlib import Path

import open_clip
from open_clip_train.data import get_wds_dataset

IMAGE_SIZE = 224


def main(dataset: str, *numbers: str) -> None:
    batch_size, num_batches, num_workers = map(int, numbers)
    last_shard = max(path.stem for path in Path(dataset).glob("*.tar"))
    arguments = Namespace(
        train_data=f"{dataset}/{{{'0' * len(last_shard)}..{last_shard}}}.tar",
        train_num_samples=100 * num_batches * batch_size,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=batch_size,
        workers=num_workers,
        world_size=1,
        seed=0,
    )
    loader = get_wds_dataset(
        arguments,
        open_clip.image_transform(IMAGE_SIZE, is_train=True),  # crops of area 0.9 to 1, bicubic
        is_train=True,
        tokenizer=open_clip.get_tokenizer("ViT-B-32"),
    ).dataloader
    for images, _ in islice(loader, num_batches):
        assert images.shape == (batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        print("batch", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
