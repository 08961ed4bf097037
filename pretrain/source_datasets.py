"""Opens the datasets that a config names: folders of shards, whole or through a subset."""

from __future__ import annotations

from pathlib import Path

from data_prep.subset import KeptSamples


def open_samples(dataset: str, *, subset: str | None) -> KeptSamples:
    """A dataset, or what a subset keeps of it.

    Args:
        dataset: folder.
        subset: `.subset` file; None for everything.

    Raises:
        InputError: one of them is missing or damaged, or they do not belong together.
    """
    return KeptSamples(Path(dataset), subset=None if subset is None else Path(subset))
