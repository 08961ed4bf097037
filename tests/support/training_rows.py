"""Rows of training batches made one at a time, for tests and benchmarks of transforms."""

import torch
from torch import Tensor

from pretrain.data.transforms import MediaTransform
from pretrain.sampling.keyed_random import SampleRandom


def training_row(
    transform: MediaTransform, content: bytes, extension: str, rng: SampleRandom
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Returns (row, masks) of a sample's bytes, as a loader writes them into a batch."""
    part = transform.decode_training(content, extension, rng)
    row = torch.empty(transform.row_shape, dtype=transform.row_dtype)
    return row, transform.write_row(part, rng, row)
