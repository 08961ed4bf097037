"""Random access to a dataset of shards: WebDataset tars with indexes.

    dataset.json          DatasetInfo: version, media kind, totals, drops by reason, fingerprint
    manifest.jsonl        one ManifestRow per shard
    00000000.tar          ustar; the members of a sample are adjacent and share their key
    00000000.idx          ShardIndex: offset, size and CRC32 of every member
    00000000.parquet      columns for users, filters and reports; training never reads it

A shard is finished if and only if its `.idx` matches its tar; the `.idx` is written last.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.index import BLOCK_BYTES, ShardIndex
from data_prep.shards.manifest import ManifestRow, _check_fingerprint, read_dataset_files
from data_prep.shards.sample import BadShardError, CorruptSampleError, Sample, split_member_name

NUM_OPEN_TARS = 128
NUM_OPEN_INDEXES = 1024  # memory-mapped, so that all processes of a machine share them
MAX_OPENINGS = 5  # attempts to open a file that is evicted repeatedly
Opened = TypeVar("Opened")


class Dataset:
    """Reads samples of a dataset by ordinal: their index in the concatenation of all shards.

    Args:
        folder: folder that holds dataset.json.
        fetch_shard: function that downloads a shard on demand. It is called with the shard's
            manifest row before the shard's files are opened, and may raise BadShardError or
            OSError. None: all shards are local, and the constructor checks their sizes.
        takes_bad_shards: whether to record missing and truncated shards in `bad_shards` instead of
            raising an error. Reading one of their samples then raises BadShardError.

    Raises:
        InputError: if the dataset is missing or unfinished.
        BadShardError: if a tar is missing or differs from its recorded size.
    """

    def __init__(
        self,
        folder: Path,
        *,
        fetch_shard: Callable[[ManifestRow], None] | None = None,
        takes_bad_shards: bool = False,
    ):
        self.folder = folder
        self.info, self.manifest = read_dataset_files(folder)
        _check_fingerprint(folder, self.info, self.manifest)
        self.tar_folder = folder / self.info.tar_folder
        self.shard_sizes = np.array([row.num_samples for row in self.manifest], dtype=np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.fetch_shard = fetch_shard
        self.bad_shards: dict[int, str] = {}  # index of the shard -> error message
        self._set_up_caches()
        if fetch_shard is None:
            self._check_tar_sizes(takes_bad_shards=takes_bad_shards)

    def _set_up_caches(self) -> None:
        self._index = lru_cache(maxsize=NUM_OPEN_INDEXES)(self._read_index)
        self._tar_descriptor = lru_cache(maxsize=NUM_OPEN_TARS)(self._open_tar)
        self._tar_name = lru_cache(maxsize=NUM_OPEN_TARS)(lambda shard: str(self.tar_path(shard)))

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without open files, so that it can be sent to loader processes."""
        caches = ("_index", "_tar_descriptor", "_tar_name")
        return {name: value for name, value in vars(self).items() if name not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up_caches()

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def locate(self, ordinal: int) -> tuple[int, int]:
        """Returns (index of the shard, position in the shard) of a sample."""
        shard = int(np.searchsorted(self.shard_starts, ordinal, side="right")) - 1
        return shard, ordinal - int(self.shard_starts[shard])

    def tar_path(self, shard: int) -> Path:
        return self.tar_folder / f"{self.manifest[shard].name}.tar"

    def read_sample(self, ordinal: int, *, fields: Sequence[str] | None = None) -> Sample:
        """Reads a sample and checks each member against its CRC32.

        Args:
            ordinal: 0 to len - 1.
            fields: extensions of the members to read; None reads all.

        Raises:
            CorruptSampleError: if a member is truncated or its CRC32 does not match.
            BadShardError: if the shard is missing or damaged.
            OSError: if the tar cannot be read.
        """
        shard, position = self.locate(ordinal)
        tar = self._tar_descriptor(shard)
        sample, bad = self._read_checked(tar.number, shard, position, fields)
        # If the tar was evicted in the meantime (no links remain), a mismatch proves no damage.
        for _ in range(MAX_OPENINGS):
            if not bad or os.fstat(tar.number).st_nlink > 0:
                break
            self._tar_descriptor.cache_clear()
            tar = self._tar_descriptor(shard)
            sample, bad = self._read_checked(tar.number, shard, position, fields)
        if bad and os.fstat(tar.number).st_nlink == 0:
            raise OSError(f"{sample}: its tar was evicted {MAX_OPENINGS} times while being read")
        if bad:
            raise CorruptSampleError(
                f"{sample}: .{bad[0]}: CRC32 mismatch with the index; "
                "check the dataset with python -m data_prep.verify_shards"
            )
        return sample

    def _read_checked(
        self, tar: int, shard: int, position: int, fields: Sequence[str] | None
    ) -> tuple[Sample, list[str]]:
        """Returns (sample, extensions of members with a CRC32 mismatch)."""
        index = self._index(shard)
        entries = index.entries_at(position)
        first_block = min(block for block, _, _ in entries.values()) - 1  # header with the key
        wanted = {
            name: entry for name, entry in entries.items() if fields is None or name in fields
        }
        # Members are adjacent: one read covers them, and the header with the key if all are read.
        start_block = first_block
        if len(wanted) < len(entries):
            start_block = min((block for block, _, _ in wanted.values()), default=first_block)
        start = start_block * BLOCK_BYTES
        end = max(
            (block * BLOCK_BYTES + size for block, size, _ in wanted.values()),
            default=start + BLOCK_BYTES,
        )
        content = os.pread(tar, end - start, start)
        header = content
        if start_block != first_block:
            header = os.pread(tar, BLOCK_BYTES, first_block * BLOCK_BYTES)
        key = index.long_keys.get(position) or _key_in(header[:BLOCK_BYTES])
        sample, bad = Sample(self._tar_name(shard), key, {}), []
        for name, (block, size, crc32) in wanted.items():
            first = block * BLOCK_BYTES - start
            sample.members[name] = content[first : first + size]
            if len(sample.members[name]) != size or zlib.crc32(sample.members[name]) != crc32:
                bad.append(name)
        return sample, bad

    def _open_tar(self, shard: int) -> _Descriptor:
        path = self.tar_path(shard)

        def open_tar() -> _Descriptor:
            try:
                return _Descriptor(os.open(path, os.O_RDONLY))
            except (FileNotFoundError, PermissionError) as error:
                raise BadShardError(f"{path}: cannot open the shard: {error.strerror}") from None

        return self._opened(shard, open_tar)

    def _read_index(self, shard: int) -> ShardIndex:
        path = self.folder / f"{self.manifest[shard].name}.idx"

        def read_index() -> ShardIndex:
            try:
                index = ShardIndex.read(path, is_mapped=True)
            except InputError as error:
                raise BadShardError(str(error)) from None
            if index.tar_sha256 != self.manifest[shard].tar_sha256:
                raise BadShardError(
                    f"{path}: belongs to a different tar than manifest.jsonl records"
                )
            return index

        return self._opened(shard, read_index)

    def _opened(self, shard: int, open_file: Callable[[], Opened]) -> Opened:
        """Fetches the shard if needed, and returns the result of `open_file`; records bad shards.

        A file that is evicted before it is opened is fetched again.
        """
        if shard in self.bad_shards:
            raise BadShardError(self.bad_shards[shard])
        try:
            if self.fetch_shard is None:
                return open_file()
            for _ in range(MAX_OPENINGS - 1):
                self.fetch_shard(self.manifest[shard])
                with suppress(BadShardError):
                    return open_file()
            self.fetch_shard(self.manifest[shard])
            return open_file()
        except BadShardError as error:
            self.bad_shards[shard] = str(error)
            raise

    def _check_tar_sizes(self, *, takes_bad_shards: bool) -> None:
        for number, row in enumerate(self.manifest):
            try:
                _check_tar_size(self.tar_folder / f"{row.name}.tar", row.tar_bytes)
            except BadShardError as error:
                if not takes_bad_shards:
                    raise
                self.bad_shards[number] = str(error)


def _check_tar_size(path: Path, expected: int) -> None:
    try:
        found = path.stat().st_size
    except OSError as error:
        raise BadShardError(
            f"{path}: expected a shard of {expected} bytes: {error.strerror}"
        ) from None
    if found != expected:
        raise BadShardError(
            f"{path}: corrupt shard: expected {expected} bytes (manifest.jsonl), found "
            f"{found}; restore it, or prepare it again after deleting it and its .idx"
        )


class _Descriptor:
    """An open file that is closed when its last reader releases it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _key_in(header: bytes) -> str:
    return split_member_name(plain_member_name(header))[0]


def plain_member_name(header: bytes) -> str:
    """Returns the name in a member's ustar header; preceding PAX and GNU headers are ignored."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", errors="replace")
