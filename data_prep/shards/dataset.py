"""Random access to a dataset of shards: WebDataset tars with indexes.

    dataset.json          DatasetInfo: version, modalities, totals, drops by reason, fingerprint
    manifest.jsonl        one ManifestRow per shard
    00000000.tar          ustar; the members of a sample are adjacent and share their key
    00000000.idx          ShardIndex: offset, size and CRC32 of every member
    00000000.parquet      columns for users, filters and reports; training never reads it

A shard is finished if and only if its `.idx` matches its tar; the `.idx` is written last.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.index import REPAIR_ADVICE, ShardIndex
from data_prep.shards.indexed_sample import read_indexed
from data_prep.shards.manifest import ManifestRow, _check_fingerprint, read_dataset_files
from data_prep.shards.sample import BadShardError, CorruptSampleError, Sample
from data_prep.shards.sample_contents import SampleContents, contents_of, fields_of
from data_prep.shards.shard_fetcher import ShardFetcher

NUM_OPEN_TARS = 128
MAX_OPEN_INDEXES = 1024
BYTES_OF_OPEN_INDEXES = 128 << 20
MAX_OPENINGS = 5  # attempts to open a file that is evicted repeatedly
MAX_DAMAGED_COPIES = 2  # of a shard; then its samples are read where the dataset is stored


class Dataset:
    """Reads samples of a dataset by ordinal: their index in the concatenation of all shards.

    Args:
        folder: folder that holds dataset.json.
        fetch_shard: fetcher of shards that are stored elsewhere; they are fetched before they are
            opened. None: all shards are local, and the constructor checks their sizes.
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
        fetch_shard: ShardFetcher | None = None,
        takes_bad_shards: bool = False,
    ):
        self.folder = folder
        self.info, self.manifest = read_dataset_files(folder)
        _check_fingerprint(folder, self.info, self.manifest)
        self.modalities = self.info.named_modalities()
        self.tar_folder = folder / self.info.tar_folder
        self.shard_sizes = np.array([row.num_samples for row in self.manifest], dtype=np.int64)
        self.shard_starts = np.concatenate([[0], np.cumsum(self.shard_sizes)])
        self.fetch_shard = fetch_shard
        self.bad_shards: dict[int, str] = {}  # index of the shard -> error message
        self._num_damaged: Counter[int] = Counter()  # index of the shard -> damaged copies found
        self._corrupt_at_source: set[int] = set()  # ordinals
        self._set_up_caches()
        if fetch_shard is None:
            self._check_tar_sizes(takes_bad_shards=takes_bad_shards)

    def _set_up_caches(self) -> None:
        most_bytes = max((row.index_bytes for row in self.manifest), default=1)
        num_indexes = min(BYTES_OF_OPEN_INDEXES // max(most_bytes, 1), MAX_OPEN_INDEXES)
        self._index = lru_cache(maxsize=max(num_indexes, 1))(self._read_index)
        self._tar_descriptor = lru_cache(maxsize=NUM_OPEN_TARS)(self._open_tar)
        self._tar_name = lru_cache(maxsize=NUM_OPEN_TARS)(lambda shard: str(self.tar_path(shard)))
        self._fields_of = lru_cache(maxsize=64)(
            lambda names: fields_of(self.modalities, names, fields=self.info.fields)
        )
        self._names_in = lru_cache(maxsize=1024)(
            lambda mask, names: names.intersection(self.modalities.names_in(mask))
        )

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without open files, so that it can be sent to loader processes."""
        caches = ("_index", "_tar_descriptor", "_tar_name", "_fields_of", "_names_in")
        return {name: value for name, value in vars(self).items() if name not in caches}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._set_up_caches()

    def __len__(self) -> int:
        return int(self.shard_starts[-1])

    def locate(self, ordinal: int) -> tuple[int, int]:
        """Returns (index of the shard, position in the shard) of a sample."""
        shard = int(self.shard_starts.searchsorted(ordinal, side="right")) - 1
        return shard, ordinal - int(self.shard_starts[shard])

    def tar_path(self, shard: int) -> Path:
        return self.tar_folder / f"{self.manifest[shard].name}.tar"

    def read_sample(self, ordinal: int, *, fields: Sequence[str] | None = None) -> Sample:
        """Reads a sample and checks each member against its CRC32.

        Args:
            ordinal: 0 to len - 1.
            fields: extensions of the members to read; None reads all.

        Raises:
            CorruptSampleError: if a member is truncated or its CRC32 does not match. A damaged
                copy of a fetched shard is replaced instead.
            BadShardError: if the shard is missing or damaged.
            OSError: if the tar cannot be read.
        """
        shard, position = self.locate(ordinal)
        sample, bad = self._read_current(shard, position, fields)
        if bad and self.fetch_shard is not None and ordinal not in self._corrupt_at_source:
            sample, bad = self._read_past_damage(shard, position, fields)
            if bad:
                self._corrupt_at_source.add(ordinal)
        if bad:
            raise CorruptSampleError(
                f"{sample}: .{bad[0]}: CRC32 mismatch with the index; "
                "check the dataset with python -m data_prep.verify_shards"
            )
        return sample

    def read_modalities(
        self, ordinal: int, *, names: Collection[str] | None = None
    ) -> SampleContents:
        """Reads a sample by modality; only the members of the wanted modalities are read.

        Args:
            ordinal: 0 to len - 1.
            names: modalities to read, of `modalities`; None reads all. Those that the sample lacks
                are left out of the result.

        Raises:
            CorruptSampleError: in the cases of `read_sample`, or if a text or vector cannot be
                parsed, or a modality is missing that the index records.
            BadShardError, OSError: as `read_sample`.
        """
        wanted = frozenset(self.modalities if names is None else names)
        sample = self.read_sample(ordinal, fields=self._fields_of(wanted))
        contents = contents_of(sample, self.modalities, names=wanted)
        shard, position = self.locate(ordinal)
        presence = self._index(shard).presence
        mask = -1 if presence is None else int(presence[position])
        recorded = self._names_in(mask, wanted)
        if recorded != contents.present:
            different = ", ".join(sorted(recorded ^ contents.present))
            raise CorruptSampleError(
                f"{sample}: {different}: the members differ from the modalities in the index; "
                "check the dataset with python -m data_prep.verify_shards"
            )
        return contents

    def presence(self, shard: int) -> np.ndarray:
        """Returns the presence masks of a shard's samples, without reading its tar.

        Returns:
            Uint32 [number of samples]. Bit k is set if the sample has modality k, in the order of
            `modalities`.

        Raises:
            BadShardError: if the index is missing or damaged.
        """
        index = self._index_alone(shard)
        if index.presence is not None:
            return index.presence
        complete = self.modalities.mask_of(self.modalities)
        return np.full(index.num_samples, complete, dtype=np.uint32)

    def has_all(self, shard: int, names: Iterable[str]) -> np.ndarray:
        """Returns whether each sample of a shard has all of some modalities, without its tar.

        Args:
            shard: index of the shard.
            names: names in `modalities`.

        Returns:
            Bool [number of samples].
        """
        mask = np.uint32(self.modalities.mask_of(names))
        return (self.presence(shard) & mask) == mask

    def _index_alone(self, shard: int) -> ShardIndex:
        """Reads the index of a shard; a shard stored elsewhere is not fetched for it."""
        if self.fetch_shard is None:
            return self._index(shard)
        row = self.manifest[shard]
        with self._recording_if_bad(shard):
            content = self.fetch_shard.read_index(row)
            try:
                return ShardIndex.parse(content, self.folder / f"{row.name}.idx")
            except InputError as error:
                raise BadShardError(str(error)) from None

    def _read_current(
        self, shard: int, position: int, fields: Sequence[str] | None
    ) -> tuple[Sample, list[str]]:
        """Reads a sample from a tar that still exists; returns the same as `_read_checked`."""
        for _ in range(1 + MAX_OPENINGS):
            tar = self._tar_descriptor(shard)
            sample, bad = self._read_checked(tar.number, shard, position, fields)
            if not bad or os.fstat(tar.number).st_nlink > 0:
                return sample, bad
            # The tar was evicted in the meantime, so a mismatch proves no damage.
            self._tar_descriptor.cache_clear()
        raise OSError(f"{sample}: its tar was evicted {MAX_OPENINGS} times while being read")

    def _read_past_damage(
        self, shard: int, position: int, fields: Sequence[str] | None
    ) -> tuple[Sample, list[str]]:
        """Reads a sample from a new copy of its shard if the current one is damaged.

        After MAX_DAMAGED_COPIES, which only a broken disk explains, it is read where the dataset
        is stored. Returns the same as `_read_checked`.
        """
        row = self.manifest[shard]
        while self._num_damaged[shard] < MAX_DAMAGED_COPIES:
            is_damaged = self._replace_if_damaged(shard)
            self._tar_descriptor.cache_clear()
            sample, bad = self._read_current(shard, position, fields)
            if not (bad and is_damaged):
                return sample, bad
        return read_indexed(
            self._index(shard),
            position,
            read_at=partial(self.fetch_shard.read_tar_at_source, row),
            fields=fields,
            tar_name=self._tar_name(shard),
        )

    def _replace_if_damaged(self, shard: int) -> bool:
        with self._recording_if_bad(shard):
            is_damaged = self.fetch_shard.replace_if_damaged(self.manifest[shard])
        self._num_damaged[shard] += is_damaged
        return is_damaged

    def _read_checked(
        self, tar: int, shard: int, position: int, fields: Sequence[str] | None
    ) -> tuple[Sample, list[str]]:
        """Returns (sample, extensions of members with a CRC32 mismatch)."""

        def read_at(num_bytes: int, start: int) -> bytes:
            try:
                return os.pread(tar, num_bytes, start)
            except OSError:
                if self.fetch_shard is None:
                    raise
                return b""  # a copy that cannot be read counts as damaged

        return read_indexed(
            self._index(shard),
            position,
            read_at=read_at,
            fields=fields,
            tar_name=self._tar_name(shard),
        )

    def _open_tar(self, shard: int) -> _Descriptor:
        path = self.tar_path(shard)
        with self._recording_if_bad(shard):
            if self.fetch_shard is None:
                return _open_local(path)
            for _ in range(MAX_OPENINGS):
                self.fetch_shard(self.manifest[shard])
                with suppress(FileNotFoundError):  # evicted before it is opened
                    return _Descriptor(os.open(path, os.O_RDONLY))
            raise OSError(f"{path}: was evicted {MAX_OPENINGS} times before it was opened")

    def _read_index(self, shard: int) -> ShardIndex:
        path = self.folder / f"{self.manifest[shard].name}.idx"
        with self._recording_if_bad(shard):
            if self.fetch_shard is None:
                content = _read_local_index(path, self.manifest[shard])
            else:
                content = self._read_copied_index(shard, path)
            try:
                return ShardIndex.parse(content, path)
            except InputError as error:
                raise BadShardError(str(error)) from None

    def _read_copied_index(self, shard: int, path: Path) -> bytes:
        row = self.manifest[shard]
        for _ in range(MAX_OPENINGS):
            self.fetch_shard(row)
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # evicted before it is read
                continue
            except OSError:  # a copy that cannot be read counts as damaged
                content = b""
            if hashlib.sha256(content).hexdigest() == row.index_sha256:
                return content
            if self._num_damaged[shard] >= MAX_DAMAGED_COPIES:
                break
            self._replace_if_damaged(shard)
        return self.fetch_shard.read_index_at_source(row)

    @contextmanager
    def _recording_if_bad(self, shard: int) -> Iterator[None]:
        """Records a BadShardError, and raises it again for a shard that is recorded already."""
        if shard in self.bad_shards:
            raise BadShardError(self.bad_shards[shard])
        try:
            yield
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


def _open_local(path: Path) -> _Descriptor:
    try:
        tar = _Descriptor(os.open(path, os.O_RDONLY))
    except (FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise BadShardError(f"{path}: cannot open the shard: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(tar.number).st_mode):
        raise BadShardError(f"{path}: cannot open the shard: expected a file")
    return tar


def _read_local_index(path: Path, row: ManifestRow) -> bytes:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise BadShardError(
            f"{path}: no index; create it with python -m data_prep.index_shards"
        ) from None
    except (IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise BadShardError(f"{path}: cannot open the index: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != row.index_sha256:
        raise BadShardError(
            f"{path}: damaged index, or the index of another tar: expected sha256 "
            f"{row.index_sha256} (manifest.jsonl), found {found}; {REPAIR_ADVICE}"
        )
    return content
