"""The dataset format on disk: tars that any WebDataset reader opens, each with an index.

    dataset.json          DatasetInfo: version, media kind, totals, drops by reason, fingerprint
    manifest.jsonl        one ManifestRow per shard
    00000000.tar          ustar; the members of a sample are adjacent and share their key
    00000000.idx          ShardIndex: the place of each member's bytes, with size and CRC32
    00000000.parquet      columns for people and filters; training never reads it

A shard is finished if and only if its `.idx`, which is renamed into place last, matches its tar.
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
NUM_OPEN_INDEXES = 1024  # mapped, so that the processes of a machine share their memory
OPENINGS = 5  # of a file that is taken away again and again
Opened = TypeVar("Opened")


class Dataset:
    """Reads any sample of a dataset by its ordinal: its place when all shards are laid end to end.

    Args:
        folder: the folder that holds dataset.json.
        fetch_shard: called with a shard's manifest row before its files are opened, for folders
            whose shards come when they are needed; raises BadShardError or OSError. None: all are
            there, which is checked at once.
        takes_bad_shards: note shards that are missing or cut in `bad_shards` instead of refusing
            the dataset; reading a sample of theirs then raises BadShardError.

    Raises:
        InputError: the dataset is missing or unfinished.
        BadShardError: a tar is missing or has not its recorded size.
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
        self.bad_shards: dict[int, str] = {}  # number of the shard -> what is wrong with it
        self._set_up_caches()
        if fetch_shard is None:
            self._check_tar_sizes(takes_bad_shards=takes_bad_shards)

    def _set_up_caches(self) -> None:
        self._index = lru_cache(maxsize=NUM_OPEN_INDEXES)(self._read_index)
        self._tar_descriptor = lru_cache(maxsize=NUM_OPEN_TARS)(self._open_tar)
        self._tar_name = lru_cache(maxsize=NUM_OPEN_TARS)(lambda shard: str(self.tar_path(shard)))

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, so that loader processes can be started in any way."""
        caches = ("_index", "_tar_descriptor", "_tar_name")
        return {name: value for name, value in vars(self).items() if name not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up_caches()

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def locate(self, ordinal: int) -> tuple[int, int]:
        """(number of the shard, place inside it) of a sample."""
        shard = int(np.searchsorted(self.shard_starts, ordinal, side="right")) - 1
        return shard, ordinal - int(self.shard_starts[shard])

    def tar_path(self, shard: int) -> Path:
        return self.tar_folder / f"{self.manifest[shard].name}.tar"

    def read_sample(self, ordinal: int, *, fields: Sequence[str] | None = None) -> Sample:
        """The sample's members, each checked against its crc32.

        Args:
            ordinal: 0 to len - 1.
            fields: the extensions wanted; None for all.

        Raises:
            CorruptSampleError: a member's bytes differ from its crc32 or are missing.
            BadShardError: its shard is missing or damaged.
            OSError: the tar cannot be read.
        """
        shard, place = self.locate(ordinal)
        tar = self._tar_descriptor(shard)
        sample, bad = self._read_checked(tar.number, shard, place, fields)
        # It was taken away, and comes again: what is read from it meanwhile says nothing.
        for _ in range(OPENINGS):
            if not bad or os.fstat(tar.number).st_nlink > 0:
                break
            self._tar_descriptor.cache_clear()
            tar = self._tar_descriptor(shard)
            sample, bad = self._read_checked(tar.number, shard, place, fields)
        if bad and os.fstat(tar.number).st_nlink == 0:
            raise OSError(f"{sample}: taken away {OPENINGS} times while it was read")
        if bad:
            raise CorruptSampleError(
                f"{sample}: .{bad[0]} has not the crc32 of its index; "
                "check the dataset with python -m data_prep.verify_shards"
            )
        return sample

    def _read_checked(
        self, tar: int, shard: int, place: int, fields: Sequence[str] | None
    ) -> tuple[Sample, list[str]]:
        """(the sample, extensions whose bytes have not their crc32)"""
        index = self._index(shard)
        entries = index.entries_at(place)
        first_block = min(block for block, _, _ in entries.values()) - 1  # the key's header
        wanted = {
            name: entry for name, entry in entries.items() if fields is None or name in fields
        }
        # In one read, with the key's header if all is wanted: members stand side by side.
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
        key = index.long_keys.get(place) or _key_in(header[:BLOCK_BYTES])
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
                raise BadShardError(f"{path}: belongs to another tar than manifest.jsonl records")
            return index

        return self._opened(shard, read_index)

    def _opened(self, shard: int, open_file: Callable[[], Opened]) -> Opened:
        """What `open_file` gives, after making the shard's files be there; notes what is bad.

        Files that come when they are needed may be taken away before they are opened: then they
        are asked for again.
        """
        if shard in self.bad_shards:
            raise BadShardError(self.bad_shards[shard])
        try:
            if self.fetch_shard is None:
                return open_file()
            for _ in range(OPENINGS - 1):
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
    """An open file that is closed when the last reader lets go of it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _key_in(header: bytes) -> str:
    return split_member_name(plain_member_name(header))[0]


def plain_member_name(header: bytes) -> str:
    """The name that a member's own header holds, without those of PAX or GNU before it."""
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", errors="replace")
