"""Interface of local copies of shards, through which a dataset stored elsewhere is read."""

from __future__ import annotations

from typing import Protocol

from data_prep.shards.manifest import ManifestRow


class ShardFetcher(Protocol):
    """Fetches shards of one dataset, and replaces damaged copies.

    Each method raises BadShardError if the stored shard is missing or differs from the manifest,
    and OSError if it cannot be read now.
    """

    def __call__(self, row: ManifestRow) -> None:
        """Ensures that a copy of a shard exists, with the recorded sizes."""

    def replace_if_damaged(self, row: ManifestRow) -> bool:
        """Compares a copy with the manifest, and fetches it again if it differs.

        Returns:
            Whether the copy was damaged.
        """

    def read_index(self, row: ManifestRow) -> bytes:
        """Reads the index of a shard that need not be fetched, and verifies it."""

    def read_index_at_source(self, row: ManifestRow) -> bytes:
        """Reads the index where the dataset is stored, because copies were damaged."""

    def read_tar_at_source(self, row: ManifestRow, num_bytes: int, start: int) -> bytes:
        """Reads bytes of a tar where the dataset is stored; fewer at the end."""
