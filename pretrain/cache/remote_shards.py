"""Copies of the shards of one dataset in a node's cache: fetched, verified and replaced.

Index and tar are downloaded to parts, checked against the manifest, flushed to the disk, and
renamed, the tar last. The first process that needs a missing shard fetches it, and the others wait.

A disk may damage a copy later. Readers find this by the checksums of the index and of the samples
(data_prep.shards.dataset). The copy is then compared with the manifest and fetched again, so the
samples of a run never depend on the disks of its nodes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from data_prep.shards.manifest import ManifestRow
from data_prep.shards.sample import BadShardError
from data_prep.storage.atomic import flush_to_disk, sha256_of
from data_prep.storage.failures import DISK_ERRORS, WrongContentError, with_retries
from data_prep.storage.file_transfer import fetch_file
from data_prep.storage.remote_file import join, open_binary
from data_prep.storage.sealed import warn_once
from pretrain.cache.eviction import CachedShards
from pretrain.cache.files import lock_path, locked, make_folder, new_part_name, remove_folder

log = logging.getLogger(__name__)


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
        with self._locked(row):
            if not self.is_here(row):
                self._fetch(row, needed_in)

    def is_here(self, row: ManifestRow) -> bool:
        """Returns whether a shard's files are in the folder, with the right sizes."""
        try:
            tar, index = self._path(row, ".tar").stat(), self._path(row, ".idx").stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        are_files = stat.S_ISREG(tar.st_mode) and stat.S_ISREG(index.st_mode)
        return are_files and (tar.st_size, index.st_size) == (row.tar_bytes, row.index_bytes)

    def name_of(self, row: ManifestRow) -> str:
        """Returns the shard's name in the cache."""
        return f"{self.folder.name}/{row.name}"

    def _path(self, row: ManifestRow, suffix: str) -> Path:
        return self.folder / f"{row.name}{suffix}"

    # ----------------------------------------------------------------------------- damaged copies

    def replace_if_damaged(self, row: ManifestRow) -> bool:
        """Compares a shard's files with the manifest, and fetches them again if they differ.

        Returns:
            Whether they differed. Another process may have fetched them again already.

        Raises:
            BadShardError, NoRoomError, OSError: as `__call__`.
        """
        with self._locked(row):
            is_damaged = self.is_here(row) and not self._is_whole(row)
            if is_damaged:
                log.warning(
                    "%s: the copy differs from manifest.jsonl (sha256) and is fetched again from "
                    "%s; if this is frequent, check the disk of %s",
                    *(self._path(row, ".tar"), self.tar_url, socket.gethostname()),
                )
                self.cached.remove(self.name_of(row))
            if not self.is_here(row):
                self._fetch(row, needed_in=0.0)
        return is_damaged

    def _is_whole(self, row: ManifestRow) -> bool:
        try:
            found = (sha256_of(self._path(row, ".tar")), sha256_of(self._path(row, ".idx")))
        except OSError:  # evicted, or not readable
            return False
        return found == (row.tar_sha256, row.index_sha256)

    def read_index(self, row: ManifestRow) -> bytes:
        """Reads the index of a shard at its URL, without fetching the shard, and verifies it.

        Raises:
            BadShardError, OSError: as `__call__`.
        """
        url = join(self.url, f"{row.name}.idx")
        with _as_bad_shard(url, row.index_bytes):
            content = self._read_range(url, row.index_bytes + 1, 0)
            if hashlib.sha256(content).hexdigest() != row.index_sha256:
                raise WrongContentError(f"{url}: expected sha256 {row.index_sha256}")
        return content

    def read_index_at_source(self, row: ManifestRow) -> bytes:
        """Reads the index of a shard at its URL, because copies of it were damaged.

        Raises:
            BadShardError, OSError: as `__call__`.
        """
        url = join(self.url, f"{row.name}.idx")
        with self._reading_at_source(url, row.index_bytes):
            return self.read_index(row)

    def read_tar_at_source(self, row: ManifestRow, num_bytes: int, start: int) -> bytes:
        """Reads bytes of a tar at its URL; fewer at the end.

        Raises:
            BadShardError, OSError: as `__call__`.
        """
        url = join(self.tar_url, f"{row.name}.tar")
        with self._reading_at_source(url, row.tar_bytes):
            return self._read_range(url, num_bytes, start)

    def _read_range(self, url: str, num_bytes: int, start: int) -> bytes:
        def read() -> bytes:
            with open_binary(url) as file:
                file.seek(start)
                return file.read(num_bytes)

        return with_retries(url, read, retries=self.retries)

    @contextmanager
    def _reading_at_source(self, url: str, num_bytes: int) -> Iterator[None]:
        broken = f"{self.folder}: several copies of {url} were damaged on this disk"
        warn_once(log, f"{broken}; damaged samples are read from the URL instead; check the disk")
        try:
            with _as_bad_shard(url, num_bytes):
                yield
        except OSError as error:
            raise OSError(
                f"{broken}, and its source cannot be read now: {error}; set loading.cache.folder "
                "to another disk"
            ) from None

    # ------------------------------------------------------------------------------------ fetching

    @contextmanager
    def _locked(self, row: ManifestRow) -> Iterator[None]:
        shard = self.folder / row.name
        make_folder(shard.parent, within=self.cached.folder)
        with locked(lock_path(shard)):
            yield

    def _fetch(self, row: ManifestRow, needed_in: float) -> None:
        index, tar = self._path(row, ".idx"), self._path(row, ".tar")
        index_part = index.with_name(new_part_name(index.name, row.index_bytes))
        tar_part = tar.with_name(new_part_name(tar.name, row.tar_bytes))
        num_bytes = row.index_bytes + row.tar_bytes
        self.cached.remove_parts_of(self.folder / row.name)  # of a process that died
        self.cached.reserve((index_part, tar_part), num_bytes=num_bytes, needed_in=needed_in)
        try:
            self._fetch_part(
                join(self.url, f"{row.name}.idx"), index_part, row.index_bytes, row.index_sha256
            )
            self._fetch_part(
                join(self.tar_url, f"{row.name}.tar"), tar_part, row.tar_bytes, row.tar_sha256
            )
            for part, path in ((index_part, index), (tar_part, tar)):
                flush_to_disk(part)
                remove_folder(path)
                part.replace(path)
        finally:
            index_part.unlink(missing_ok=True)
            tar_part.unlink(missing_ok=True)

    def _fetch_part(self, url: str, part: Path, num_bytes: int, sha256: str) -> None:
        try:
            with _as_bad_shard(url, num_bytes):
                fetch_file(url, part, retries=self.retries, num_bytes=num_bytes, sha256=sha256)
        except BadShardError:
            if part.parent.is_dir():
                raise
            raise OSError(f"{part.parent}: this folder of the cache was removed") from None
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


@contextmanager
def _as_bad_shard(url: str, num_bytes: int) -> Iterator[None]:
    """Converts the errors of a stored shard that is missing or wrong to BadShardError."""
    try:
        yield
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
