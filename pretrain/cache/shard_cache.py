"""Node-local cache for datasets behind URLs: whole shards on a disk, fetched once per node.

    <folder>/<host>/datasets/<digest of the manifest>/     dataset.json, manifest.jsonl
                                                           00000000.idx and .tar, once fetched
                    files/<digest>.subset                  subsets
                    progress/<rank>                        step that a rank has reached

The first process that needs a missing shard fetches it (cache.remote_shards); the prefetcher does
so ahead of time (cache.prefetch). Each node has its own folder, even if nodes share the disk by
mistake.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import zlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.manifest import parse_info, parse_manifest, write_dataset_files
from data_prep.storage.atomic import write_atomically
from data_prep.storage.file_transfer import fetch_bytes
from data_prep.storage.remote_file import join
from pretrain.cache.eviction import NUM_BYTES_PER_GIGABYTE, CachedShards
from pretrain.cache.files import make_folder, open_file, remove_folder
from pretrain.cache.remote_shards import RemoteShards
from pretrain.settings.data import Cache

DIGEST_DIGITS = 32
STEP_BYTES = 8


class ShardCache:
    """Cache of one node. It can be pickled, and used by many threads and processes at once.

    Args:
        settings: section `loading.cache`, with a folder.
        retries: retries of a download after a transient error.
        host: name of the node.

    Raises:
        InputError: if no folder is set, or it cannot be created.
    """

    def __init__(self, settings: Cache, *, retries: int, host: str = socket.gethostname()) -> None:
        if settings.folder is None:
            raise InputError("loading.cache.folder: expected a folder on a disk of the node")
        self.settings = settings
        self.retries = retries
        self.folder = settings.folder / re.sub(r"[^A-Za-z0-9.-]", "-", host)
        try:
            for name in ("datasets", "files", "progress"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{error.filename}: expected a folder that can be written to: {error.strerror}; "
                "set loading.cache.folder"
            ) from None
        allowed = settings.max_gigabytes
        self.shards = CachedShards(
            self.folder / "datasets",
            max_bytes=None if allowed is None else int(allowed * NUM_BYTES_PER_GIGABYTE),
        )

    # --------------------------------------------------------------------------------- datasets

    def open_dataset(self, url: str, *, takes_bad_shards: bool = False) -> Dataset:
        """Opens the dataset at a URL; its shards are fetched when they are read.

        Raises:
            InputError: if the dataset is missing, unfinished or damaged.
            OSError: if it cannot be read now.
        """
        info_bytes = self._fetch_small(join(url, "dataset.json"), expected="a dataset of shards")
        manifest_bytes = self._fetch_small(join(url, "manifest.jsonl"), expected="its manifest")
        info = parse_info(info_bytes, join(url, "dataset.json"))
        rows = parse_manifest(manifest_bytes, join(url, "manifest.jsonl"))
        digest = hashlib.sha256(manifest_bytes).hexdigest()[:DIGEST_DIGITS]
        folder = self.shards.folder / digest
        make_folder(folder, within=self.folder)
        for name in ("dataset.json", "manifest.jsonl"):
            remove_folder(folder / name)
        # In the cache, tars are in the same folder as their indexes.
        write_dataset_files(folder, replace(info, tar_folder="."), manifest=rows)
        tar_url = url if info.tar_folder == "." else join(url, info.tar_folder)
        shards = RemoteShards(url, tar_url, folder, self.shards, self.retries)
        return Dataset(folder, fetch_shard=shards, takes_bad_shards=takes_bad_shards)

    def fetch_subset(self, url: str) -> Path:
        """Downloads a `.subset` file, and returns its path in the cache.

        Raises:
            InputError: if the file is missing.
            OSError: if it cannot be read now.
        """
        content = self._fetch_small(url, expected="a subset")
        digest = hashlib.sha256(content).hexdigest()[:DIGEST_DIGITS]
        path = self.folder / "files" / f"{digest}.subset"
        remove_folder(path)
        write_atomically(path, content)
        return path

    def _fetch_small(self, url: str, *, expected: str) -> bytes:
        try:
            return fetch_bytes(url, self.folder / "files", retries=self.retries)
        except (FileNotFoundError, PermissionError) as error:
            raise InputError(f"{url}: expected {expected}: {error.strerror}") from None

    # --------------------------------------------------------------------------------- progress

    def publish_progress(self, rank: int, step: int) -> None:
        """Publishes that a rank has read everything before a step."""
        content = step.to_bytes(STEP_BYTES, "little")
        descriptor = open_file(self._progress_path(rank), os.O_WRONLY | os.O_CREAT)
        try:
            os.pwrite(descriptor, content + _checksum(content), 0)
        finally:
            os.close(descriptor)

    def least_progress(self, ranks: Iterable[int]) -> int:
        """Returns the step that all these ranks have reached; 0 if one has published nothing.

        A damaged file is left out: its rank writes it again after its next step.
        """
        return min((step for rank in ranks if (step := self._progress_of(rank)) >= 0), default=0)

    def _progress_of(self, rank: int) -> int:
        """Step that a rank has reached; -1 if its file is damaged."""
        try:
            content = self._progress_path(rank).read_bytes()
        except FileNotFoundError:
            return 0
        except OSError:
            return -1
        step, checksum = content[:STEP_BYTES], content[STEP_BYTES:]
        return int.from_bytes(step, "little") if _checksum(step) == checksum else -1

    def _progress_path(self, rank: int) -> Path:
        return self.folder / "progress" / str(rank)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")
