"""Pairs and media from WebDataset tars and from dataset folders written by this package.

The captions of a sample are in its .json (captions, caption or text) or in its .txt, as img2dataset
and LAION write them. `caption_source` decides if both have one. The place of a pair's media is
"<offset>:<bytes>" in the tar, followed by ":<crc32>" if an index records it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.index import (
    ABSENT,
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.parquet import check_parquet_sum
from data_prep.shards.subset import Subset
from data_prep.shards.tar_members import BadTarError, read_members
from data_prep.sources.input_files import MEDIA_SUFFIXES, PairSource, files_of_input, readable_input
from data_prep.sources.pair import BadItemError, FileRef, Pair
from data_prep.sources.rows import MAX_SIDECAR_BYTES, pairs_of_sidecar, rejected_media
from data_prep.sources.sample_rows import SampleMembers, SampleRows, pair_of_members
from data_prep.storage import remote_file

SIDECARS = ("json", "txt")


@dataclass(frozen=True, slots=True)
class TarMember:
    """The location of one member of a sample in a tar."""

    extension: str
    offset: int
    num_bytes: int
    crc32: int | None = None

    @property
    def place(self) -> str:
        """The location in the notation of `Pair.place`."""
        crc32 = "" if self.crc32 is None else f":{self.crc32}"
        return f"{self.offset}:{self.num_bytes}{crc32}"


def read_webdataset(source: PairSource) -> Iterator[Pair]:
    """Yields the pairs of tars, or of a dataset folder (only samples in `subset`, if set).

    Raises:
        InputError: if a tar is damaged or unreadable, or has members that a dataset must not have.
            Also if the subset belongs to a different dataset.
    """
    folder = dataset_folder_of(source)
    samples = (
        _samples_of_tars(source.input) if folder is None else _samples_of_dataset(source, folder)
    )
    rows = SampleRows(source) if source.media is None else None
    for row, sample in enumerate(samples, 1):
        if rows is None:
            yield from _pairs_of_sample(sample, source, row=row)
        else:
            yield _sample_pair(sample, rows, row=row)


def dataset_folder_of(source: PairSource) -> Path | None:
    """Returns the input if it is a local dataset folder, or else None.

    Raises:
        InputError: if a subset is set, but the input is not such a folder.
    """
    folder = remote_file.local_path(source.input)
    if folder is not None and (folder / "dataset.json").is_file():
        return folder
    if source.subset is not None:
        raise InputError(
            f"{source.input}: subset={source.subset} requires a local folder with a dataset.json "
            "(input); create one for tars with python -m data_prep.index_shards"
        )
    return None


@dataclass(frozen=True, slots=True)
class _TarSample:
    """A sample found in an opened tar."""

    tar: str  # name of the tar, relative to the input's folder
    file: BinaryIO
    members: list[TarMember]
    columns: dict[str, Any]  # values from the shard's Parquet file


def _pairs_of_sample(sample: _TarSample, source: PairSource, *, row: int) -> Iterator[Pair]:
    name, members = sample.tar, sample.members
    found = [member.extension for member in members]
    if len(set(found)) != len(found):
        repeated = next(extension for extension in found if found.count(extension) > 1)
        yield rejected_media(row, name, "duplicate_member", f"two members .{repeated} with one key")
        return
    media = next((m for m in members if f".{m.extension}" in MEDIA_SUFFIXES[source.media]), None)
    if media is None:
        detail = f"expected an {source.media} member, found .{' .'.join(found)}"
        yield rejected_media(row, name, "no_media_member", detail)
        return
    sidecars = {member.extension: member for member in members if member.extension in SIDECARS}
    if any(member.num_bytes > MAX_SIDECAR_BYTES for member in sidecars.values()):
        detail = f"more than {MAX_SIDECAR_BYTES:,} bytes"
        yield rejected_media(row, name, "unreadable_caption", detail)
        return
    contents = {
        extension: read_member(sample.file, member.place, path=name)
        for extension, member in sidecars.items()
    }
    yield from pairs_of_sidecar(
        source.columns,
        source.keep_columns,
        row=row,
        media=name,
        place=media.place,
        json_bytes=contents.get("json"),
        txt_bytes=contents.get("txt"),
        caption_source=source.caption_source,
        defaults=sample.columns,
    )


def _sample_pair(sample: _TarSample, rows: SampleRows, *, row: int) -> Pair:
    """Builds the pair of a sample of modalities."""
    found = {member.extension: member for member in sample.members}
    if len(found) != len(sample.members):
        detail = f"two members with one key among .{' .'.join(m.extension for m in sample.members)}"
        return rejected_media(row, sample.tar, "duplicate_member", detail)

    def read(member: TarMember) -> bytes:
        if member.num_bytes > MAX_SIDECAR_BYTES:
            detail = f".{member.extension}: more than {MAX_SIDECAR_BYTES:,} bytes"
            raise BadItemError("unreadable_caption", detail)
        return read_member(sample.file, member.place, path=sample.tar)

    def ref(member: TarMember) -> FileRef:
        return FileRef(sample.tar, member.place)

    members = SampleMembers(found, ref=ref, read=read, columns=sample.columns)
    return pair_of_members(rows, row, members)


# ---------------------------------------------------------------------------- tars without index


class _RemoteTar:
    """A tar at a URL, which can be opened like a Path."""

    def __init__(self, url: str):
        self.url = url

    def open(self, _mode: str) -> BinaryIO:
        return remote_file.open_binary(self.url)

    def __str__(self) -> str:
        return self.url


def _samples_of_tars(path_of_tars: str) -> Iterator[_TarSample]:
    files = files_of_input(path_of_tars, "webdataset")
    for name in files.names:
        path = files.path_of(name)
        local = remote_file.local_path(path)
        opened = _RemoteTar(path) if local is None else local
        try:
            with readable_input(path), remote_file.open_binary(path) as file:
                members = read_members(opened, any_encoding=True)
                for _, sample in groupby(members, key=lambda member: member.key):
                    found = [
                        TarMember(m.extension, m.data_block * BLOCK_BYTES, m.num_bytes)
                        for m in sample
                    ]
                    yield _TarSample(name, file, found, {})
        except BadTarError as error:
            raise InputError(f"{error}; restore this tar, or exclude it from the input") from None


# -------------------------------------------------------------------------------- dataset folders


def _samples_of_dataset(source: PairSource, folder: Path) -> Iterator[_TarSample]:
    dataset = Dataset(folder)
    if source.media is not None and dataset.info.media != source.media:
        raise InputError(
            f"{folder}: expected a dataset of media={source.media}, found {dataset.info.media}"
        )
    kept = read_subset(source.subset, dataset)
    wanted = {*source.keep_columns, source.columns.class_name, source.columns.uid} - {None}
    wanted |= set(source.columns.labels.values())
    for number, manifest_row in enumerate(dataset.manifest):
        start, end = dataset.shard_starts[number : number + 2].tolist()
        bitmap = None if kept is None else kept.bitmap[start:end]
        if bitmap is not None and not bitmap.any():
            continue
        index = ShardIndex.read(folder / f"{manifest_row.name}.idx")
        name = f"{dataset.info.tar_folder}/{manifest_row.name}.tar".removeprefix("./")
        path = str(dataset.tar_path(number))
        parquet_path = folder / f"{manifest_row.name}.parquet"
        if wanted and parquet_path.exists():
            check_parquet_sum(parquet_path, manifest_row)
        rows = _column_rows(parquet_path, wanted, num_samples=index.num_samples)
        with readable_input(path), remote_file.open_binary(path) as file, closing(rows):
            for sample, columns in enumerate(rows):
                if bitmap is None or bitmap[sample]:
                    yield _TarSample(name, file, _members_of(index, sample), columns)


def read_subset(path: Path | None, dataset: Dataset) -> Subset | None:
    """Reads a subset of a dataset; returns None if `path` is None.

    Raises:
        InputError: if the subset belongs to a different dataset.
    """
    if path is None:
        return None
    subset = Subset.read(path)
    subset.check_belongs_to(dataset.info)
    return subset


def _members_of(index: ShardIndex, sample: int) -> list[TarMember]:
    values = zip(index.fields, index.table[sample].tolist(), strict=True)
    return [
        TarMember(extension, block * BLOCK_BYTES, size, crc32)
        for extension, (block, size, crc32) in values
        if block != ABSENT
    ]


def _column_rows(path: Path, wanted: set[str], *, num_samples: int) -> Iterator[dict[str, Any]]:
    """Yields the wanted columns of each sample, if the shard's Parquet file has them."""
    from data_prep.sources.parquet import open_parquet

    if not wanted or not path.exists():
        yield from ({} for _ in range(num_samples))
        return
    with open_parquet(str(path)) as file:
        if file.metadata.num_rows != num_samples:
            raise InputError(
                f"{path}: expected {num_samples} rows, one per sample, found "
                f"{file.metadata.num_rows}; check the dataset with "
                "python -m data_prep.verify_shards"
            )
        present = [name for name in file.schema_arrow.names if name in wanted]
        if not present:
            yield from ({} for _ in range(num_samples))
            return
        for batch in file.iter_batches(columns=present, use_threads=False):
            yield from batch.to_pylist()


# ------------------------------------------------------------------------------------------ bytes


class TarMedia:
    """The media in one tar.

    Args:
        path: path or URL of the tar.
        max_bytes: media above this limit are rejected without being read.
    """

    def __init__(self, path: str, *, max_bytes: int):
        self.path = path
        self.max_bytes = max_bytes
        with readable_input(path):
            self._file = remote_file.open_binary(path)

    def read(self, place: str) -> bytes:
        """Reads the bytes at a place.

        Raises:
            BadItemError: if there are more than `max_bytes`.
            InputError: if the tar is unreadable, or has changed.
        """
        num_bytes = int(place.split(":")[1])
        if num_bytes > self.max_bytes:
            detail = f"{num_bytes:,} bytes; expected at most {self.max_bytes:,}"
            raise BadItemError("too_large", detail)
        return read_member(self._file, place, path=self.path)

    def close(self) -> None:
        """Closes the tar."""
        self._file.close()


def read_member(file: BinaryIO, place: str, *, path: str) -> bytes:
    """Reads the bytes at a place in an open tar.

    Raises:
        InputError: if the bytes are truncated, or their CRC32 differs from the recorded one.
    """
    offset, num_bytes, *crc32 = map(int, place.split(":"))
    with readable_input(path):
        file.seek(offset, os.SEEK_SET)
        content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise InputError(
            f"{path}: expected {num_bytes} bytes at {offset}, found {len(content)}; the tar is "
            "truncated, or has changed since the plan was made"
        )
    if crc32 and zlib.crc32(content) != crc32[0]:
        raise InputError(
            f"{path}: CRC32 mismatch with the index in the member at byte {offset}; check the "
            "dataset with python -m data_prep.verify_shards"
        )
    return content
