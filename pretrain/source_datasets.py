"""Opens the datasets that a config names: folders of shards, whole or through a subset."""

from __future__ import annotations

from pathlib import Path

from data_prep.shard_format import Dataset
from data_prep.subset import KeptSamples


def open_samples(
    dataset: str, *, subset: str | None, takes_bad_shards: bool = False
) -> KeptSamples:
    """A dataset, or what a subset keeps of it.

    Args:
        dataset: folder.
        subset: `.subset` file; None for everything.
        takes_bad_shards: see data_prep.shard_format.Dataset.

    Raises:
        InputError: one of them is missing or damaged, or they do not belong together.
    """
    opened = Dataset(Path(dataset), takes_bad_shards=takes_bad_shards)
    return KeptSamples(opened, subset=None if subset is None else Path(subset))
