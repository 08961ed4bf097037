"""Datasets that a config names: folders or URLs of shards, whole or through a subset."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import (
    InputError,
    RunError,
)
from data_prep.shards.dataset import Dataset
from data_prep.shards.subset import KeptSamples
from data_prep.storage.remote_file import is_url
from pretrain.cache.shard_cache import ShardCache
from pretrain.settings.data import Loading


def build_cache(loading: Loading) -> ShardCache | None:
    """Builds this node's cache; None if no folder is configured.

    Args:
        loading: section `loading`.

    Raises:
        InputError: if the cache's folder cannot be created.
    """
    if loading.cache.folder is None:
        return None
    return ShardCache(loading.cache, retries=loading.retries)


def open_samples(
    dataset: str,
    *,
    subset: str | None,
    required: Sequence[str] = (),
    cache: ShardCache | None = None,
    takes_bad_shards: bool = False,
) -> KeptSamples:
    """Opens a dataset, or the part of it that a subset keeps.

    Args:
        dataset: folder, which is read in place, or URL, which is read through the cache.
        subset: path or URL of a `.subset` file; None keeps everything.
        required: modalities; samples that lack one are left out.
        cache: this node's cache; None if no URL is expected.
        takes_bad_shards: see data_prep.shards.dataset.Dataset.

    Raises:
        InputError: if the dataset or the subset is missing, damaged, or of another dataset, or if a
            URL has no cache.
        RunError: if a URL cannot be read now.
    """
    try:
        samples = _open(dataset, subset, cache, takes_bad_shards=takes_bad_shards)
        return samples.having_all(required) if required else samples
    except OSError as error:
        if not is_url(dataset) and not is_url(subset or ""):
            raise
        raise RunError(f"cannot open a dataset now: {error}; start again when it can be") from None


def _open(
    dataset: str, subset: str | None, cache: ShardCache | None, *, takes_bad_shards: bool
) -> KeptSamples:
    if is_url(dataset):
        opened = _cache_for(dataset, cache).open_dataset(dataset, takes_bad_shards=takes_bad_shards)
    else:
        opened = Dataset(Path(dataset), takes_bad_shards=takes_bad_shards)
    if subset is not None and is_url(subset):
        return KeptSamples(opened, subset=_cache_for(subset, cache).fetch_subset(subset))
    return KeptSamples(opened, subset=None if subset is None else Path(subset))


def _cache_for(url: str, cache: ShardCache | None) -> ShardCache:
    if cache is None:
        raise InputError(
            f"{url}: a URL is read through a cache on each node: set loading.cache.folder to a "
            "folder on a disk of the node, or give the path of a local folder"
        )
    return cache
