"""Reads pairs from WebDataset tars, and from dataset folders of ours.

Captions stand in the .json (captions, caption or text), else in the .txt of a sample, as
img2dataset and LAION write them. The place of a pair's media is "<offset>:<bytes>" in the tar, and
":<crc32>" behind where an index knows it.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.config import MakeShards
from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.index import (
    ABSENT,
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.subset import Subset
from data_prep.shards.tar_members import BadTarError, read_members
from data_prep.sources.input_files import MEDIA_SUFFIXES, files_of_input, readable_input
from data_prep.sources.pair import BadItemError, Pair
from data_prep.sources.rows import MAX_SIDECAR_BYTES, pairs_of_sidecar, rejected_media
from data_prep.storage import remote_file

SIDECARS = ("json", "txt")


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of a sample: where its bytes are in the tar."""

    extension: str
    offset: int
    num_bytes: int
    crc32: int | None = None

    @property
    def place(self) -> str:
        """As a pair holds it."""
        crc32 = "" if self.crc32 is None else f":{self.crc32}"
        return f"{self.offset}:{self.num_bytes}{crc32}"


def read_webdataset(config: MakeShards) -> Iterator[Pair]:
    """The pairs of tars, or of a dataset folder and what `subset` keeps of it.

    Raises:
        InputError: a tar is damaged, holds what no dataset may hold, or is not readable; or the
            subset belongs to another dataset.
    """
    folder = dataset_folder_of(config)
    samples = _samples_of_tars(config) if folder is None else _samples_of_dataset(config, folder)
    for row, (name, file, members, columns) in enumerate(samples, 1):
        yield from _pairs_of_sample(
            config, row=row, name=name, file=file, members=members, columns=columns
        )


def dataset_folder_of(config: MakeShards) -> Path | None:
    """The input, where it is a dataset folder on this machine.

    Raises:
        InputError: there is a subset, but no dataset that it could be of.
    """
    folder = remote_file.local_path(config.input)
    if folder is not None and (folder / "dataset.json").is_file():
        return folder
    if config.subset is not None:
        raise InputError(
            f"{config.input}: subset={config.subset} needs a local folder with a dataset.json "
            "(input); make one for tars with python -m data_prep.index_shards"
        )
    return None


def _pairs_of_sample(
    config: MakeShards,
    *,
    row: int,
    name: str,
    file: BinaryIO,
    members: Sequence[TarMember],
    columns: dict[str, Any],
) -> Iterator[Pair]:
    found = [member.extension for member in members]
    if len(set(found)) != len(found):
        repeated = next(extension for extension in found if found.count(extension) > 1)
        yield rejected_media(row, name, "duplicate_member", f"two members .{repeated} of one key")
        return
    media = next((m for m in members if f".{m.extension}" in MEDIA_SUFFIXES[config.media]), None)
    if media is None:
        detail = f"expected a member that is {config.media}, found .{' .'.join(found)}"
        yield rejected_media(row, name, "no_media_member", detail)
        return
    sidecars = {member.extension: member for member in members if member.extension in SIDECARS}
    if any(member.num_bytes > MAX_SIDECAR_BYTES for member in sidecars.values()):
        detail = f"more than {MAX_SIDECAR_BYTES:,} bytes"
        yield rejected_media(row, name, "unreadable_caption", detail)
        return
    contents = {
        extension: read_member(file, member.place, path=name)
        for extension, member in sidecars.items()
    }
    yield from pairs_of_sidecar(
        config,
        row=row,
        media=name,
        place=media.place,
        json_bytes=contents.get("json"),
        txt_bytes=contents.get("txt"),
        further=columns,
    )


# ---------------------------------------------------------------------------------- other's tars


Found = tuple[str, BinaryIO, list[TarMember], dict[str, Any]]  # tar, opened, a sample, its columns


class _RemoteTar:
    """A tar behind a URL, which opens as a path does."""

    def __init__(self, url: str):
        self.url = url

    def open(self, _mode: str) -> BinaryIO:
        return remote_file.open_binary(self.url)

    def __str__(self) -> str:
        return self.url


def _samples_of_tars(config: MakeShards) -> Iterator[Found]:
    files = files_of_input(config, "webdataset")
    for name in files.names:
        path = files.path_of(name)
        local = remote_file.local_path(path)
        opened = _RemoteTar(path) if local is None else local
        try:
            with readable_input(path), remote_file.open_binary(path) as file:
                members = read_members(opened)
                for _, sample in groupby(members, key=lambda member: member.key):
                    found = [
                        TarMember(m.extension, m.data_block * BLOCK_BYTES, m.num_bytes)
                        for m in sample
                    ]
                    yield name, file, found, {}
        except BadTarError as error:
            raise InputError(f"{error}; restore this tar, or leave it out of the input") from None


# ------------------------------------------------------------------------------- our own datasets


def _samples_of_dataset(config: MakeShards, folder: Path) -> Iterator[Found]:
    dataset = Dataset(folder)
    if dataset.info.media != config.media:
        raise InputError(
            f"{folder}: expected a dataset of media={config.media}, found {dataset.info.media}"
        )
    kept = subset_of(config, dataset)
    for number, manifest_row in enumerate(dataset.manifest):
        start, end = dataset.shard_starts[number : number + 2].tolist()
        bitmap = None if kept is None else kept.bitmap[start:end]
        if bitmap is not None and not bitmap.any():
            continue
        index = ShardIndex.read(folder / f"{manifest_row.name}.idx")
        name = f"{dataset.info.tar_folder}/{manifest_row.name}.tar".removeprefix("./")
        path = str(dataset.tar_path(number))
        rows = _column_rows(config, folder / f"{manifest_row.name}.parquet", index.num_samples)
        with readable_input(path), remote_file.open_binary(path) as file, closing(rows):
            for place, columns in enumerate(rows):
                if bitmap is None or bitmap[place]:
                    yield name, file, _members_of(index, place), columns


def subset_of(config: MakeShards, dataset: Dataset) -> Subset | None:
    """The configured subset of a dataset.

    Raises:
        InputError: it belongs to another dataset.
    """
    if config.subset is None:
        return None
    subset = Subset.read(config.subset)
    subset.check_belongs_to(dataset.info)
    return subset


def _members_of(index: ShardIndex, place: int) -> list[TarMember]:
    values = zip(index.fields, index.table[place].tolist(), strict=True)
    return [
        TarMember(extension, block * BLOCK_BYTES, size, crc32)
        for extension, (block, size, crc32) in values
        if block != ABSENT
    ]


def _column_rows(config: MakeShards, path: Path, num_samples: int) -> Iterator[dict[str, Any]]:
    """What the shard's Parquet knows of each sample, of the columns that the config names."""
    from data_prep.sources.parquet import open_parquet

    columns = config.columns
    wanted = {*config.keep_columns, columns.class_name, columns.uid} - {None}
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
    """The bytes of media in one tar.

    Args:
        path: path or URL of the tar.
        max_bytes: larger media are not read.
    """

    def __init__(self, path: str, *, max_bytes: int):
        self.path = path
        self.max_bytes = max_bytes
        with readable_input(path):
            self._file = remote_file.open_binary(path)

    def read(self, place: str) -> bytes:
        """The bytes at a place.

        Raises:
            BadItemError: they are too many.
            InputError: the tar is not readable, or has changed.
        """
        num_bytes = int(place.split(":")[1])
        if num_bytes > self.max_bytes:
            detail = f"{num_bytes:,} bytes; at most {self.max_bytes:,} are read"
            raise BadItemError("too_large", detail)
        return read_member(self._file, place, path=self.path)

    def close(self) -> None:
        """Closes the tar."""
        self._file.close()


def read_member(file: BinaryIO, place: str, *, path: str) -> bytes:
    """The bytes at a place of an opened tar.

    Raises:
        InputError: they are cut short, or have not the recorded crc32.
    """
    offset, num_bytes, *crc32 = map(int, place.split(":"))
    with readable_input(path):
        file.seek(offset, os.SEEK_SET)
        content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise InputError(
            f"{path}: expected {num_bytes} bytes at {offset}, found {len(content)}; the tar is cut "
            "short, or has changed since the plan was made"
        )
    if crc32 and zlib.crc32(content) != crc32[0]:
        raise InputError(
            f"{path}: the member at byte {offset} has not the crc32 of its index; check the "
            "dataset with python -m data_prep.verify_shards"
        )
    return content
