"""Node-local cache for datasets behind URLs: whole shards on a disk, fetched once per node.

    <folder>/<host>/datasets/<digest of the manifest>/     dataset.json, manifest.jsonl
                                                           00000000.idx and .tar, once fetched
                    files/<digest>.subset                  subsets
                    progress/<rank>                        step that a rank has reached

A tar that is present is whole: index and tar are downloaded to parts, checked against the manifest,
and renamed, the tar last. The first process that needs a missing shard fetches it, and the others
wait. The prefetcher does the same ahead of time. Each node has its own folder, even if nodes share
the disk by mistake.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.manifest import (
    ManifestRow,
    parse_info,
    parse_manifest,
    write_dataset_files,
)
from data_prep.shards.sample import BadShardError
from data_prep.storage.atomic import write_atomically
from data_prep.storage.failures import DISK_ERRORS, WrongContentError
from data_prep.storage.file_transfer import fetch_bytes, fetch_file
from data_prep.storage.remote_file import join
from pretrain.cache.eviction import (
    NUM_BYTES_PER_GIGABYTE,
    CachedShards,
    lock_path,
    locked,
    part_name,
)
from pretrain.config import Cache

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
        folder.mkdir(exist_ok=True)
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
        descriptor = os.open(self._progress_path(rank), os.O_WRONLY | os.O_CREAT, 0o666)
        try:
            os.pwrite(descriptor, step.to_bytes(STEP_BYTES, "little"), 0)
        finally:
            os.close(descriptor)

    def least_progress(self, ranks: Iterable[int]) -> int:
        """Returns the step that all these ranks have reached; 0 if one has published nothing."""
        return min(self._progress_of(rank) for rank in ranks)

    def _progress_of(self, rank: int) -> int:
        with suppress(FileNotFoundError):
            return int.from_bytes(self._progress_path(rank).read_bytes(), "little")
        return 0

    def _progress_path(self, rank: int) -> Path:
        return self.folder / "progress" / str(rank)


@dataclass(frozen=True)
class RemoteShards:
    """Fetcher of the shards of one dataset; calling it fetches a shard."""

    url: str  # folder that holds the indexes
    tar_url: str  # folder that holds the tars
    folder: Path
    cached: CachedShards
    retries: int

    def __call__(self, row: ManifestRow, *, needed_in: float = 0.0) -> None:
        """Ensures that the files of a shard are in the folder; quick if they are there.

        Args:
            row: row of the manifest.
            needed_in: steps until the shard is needed; see `CachedShards.reserve`.

        Raises:
            BadShardError: if the shard is missing, access is denied, or it differs from the
                manifest.
            NoRoomError: if everything else in the cache is needed before it.
            OSError: if it cannot be fetched now, or the disk is full.
        """
        if self.is_here(row):
            with suppress(FileNotFoundError):
                os.utime(self._path(row, ".tar"))
            return
        shard = self.folder / row.name
        shard.parent.mkdir(parents=True, exist_ok=True)
        with locked(lock_path(shard)):
            if not self.is_here(row):
                self._fetch(row, needed_in)

    def is_here(self, row: ManifestRow) -> bool:
        """Returns whether a shard's files are in the folder, with the right sizes."""
        try:
            tar, index = self._path(row, ".tar").stat(), self._path(row, ".idx").stat()
        except FileNotFoundError:
            return False
        return (tar.st_size, index.st_size) == (row.tar_bytes, row.index_bytes)

    def name_of(self, row: ManifestRow) -> str:
        """Returns the shard's name in the cache."""
        return f"{self.folder.name}/{row.name}"

    def _path(self, row: ManifestRow, suffix: str) -> Path:
        return self.folder / f"{row.name}{suffix}"

    def _fetch(self, row: ManifestRow, needed_in: float) -> None:
        index, tar = self._path(row, ".idx"), self._path(row, ".tar")
        index_part = index.with_name(part_name(index.name, row.index_bytes))
        tar_part = tar.with_name(part_name(tar.name, row.tar_bytes))
        num_bytes = row.index_bytes + row.tar_bytes
        self.cached.reserve((index_part, tar_part), num_bytes=num_bytes, needed_in=needed_in)
        try:
            self._fetch_part(
                join(self.url, f"{row.name}.idx"), index_part, row.index_bytes, row.index_sha256
            )
            self._fetch_part(
                join(self.tar_url, f"{row.name}.tar"), tar_part, row.tar_bytes, row.tar_sha256
            )
            index_part.replace(index)
            tar_part.replace(tar)
        finally:
            index_part.unlink(missing_ok=True)
            tar_part.unlink(missing_ok=True)

    def _fetch_part(self, url: str, part: Path, num_bytes: int, sha256: str) -> None:
        try:
            fetch_file(url, part, retries=self.retries, num_bytes=num_bytes, sha256=sha256)
        except (FileNotFoundError, PermissionError) as error:
            raise BadShardError(
                f"{url}: expected a shard's file of {num_bytes} bytes (manifest.jsonl): "
                f"{error.strerror}; put it back, or give the dataset without this shard"
            ) from None
        except WrongContentError as error:
            raise BadShardError(
                f"{error}: not what manifest.jsonl records; upload the shard again, and check the "
                "dataset with python -m data_prep.verify_shards"
            ) from None
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno)}: no room for {num_bytes / 1e9:.6g} GB of {url}; free "
                "space, set loading.cache.max_gigabytes lower, or loading.cache.folder to a "
                "larger disk",
                str(self.folder),
            ) from None
