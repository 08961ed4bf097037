"""Indexing of an existing tar, optionally with a Parquet file of its samples.

headers, payloads -> samples with CRC32 -> drop and count incomplete and undecodable samples
                  -> .parquet (if `measure`), then .idx
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data_prep.media.decode import MediaError
from data_prep.modalities.modality import Modalities, VectorShape
from data_prep.modalities.vectors import VectorError, from_npy
from data_prep.shards.columns import CollectedType, KeptType, KeptTypes, schema_of
from data_prep.shards.index import (
    ABSENT,
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.indexed_sample import plain_member_name
from data_prep.shards.parquet import measure_sample, row_of_sample, write_shard_parquet
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    caption_tags,
    captions_of,
    media_kind_of,
    split_member_name,
)
from data_prep.shards.sample_contents import PresenceTable, contents_of
from data_prep.shards.tar_members import BadTarError, Member, read_members
from data_prep.storage.atomic import write_atomically


@dataclass(frozen=True)
class IndexTask:
    """A worker's task: the tar to index."""

    tar_path: Path
    index_path: Path
    name: str  # name of the shard
    modalities: Modalities
    skip_incomplete: bool
    measure: bool
    kept: Mapping[str, KeptType] = field(default_factory=dict)  # labels and kept columns
    min_modalities: int = 1  # of samples that are not pairs

    @property
    def parquet_path(self) -> Path:
        """Path of the Parquet file, next to the index."""
        return self.index_path.with_name(f"{self.index_path.name.removesuffix('.idx')}.parquet")


@dataclass(frozen=True)
class TarSample:
    """A sample of a tar, with its bytes."""

    sample: Sample
    entries: dict[str, tuple[int, int, int]]  # extension -> (data block, size in bytes, CRC32)


@dataclass
class TarTable:
    """The samples that the index of a tar will contain, without their bytes."""

    modalities: Modalities
    keys: list[str] = field(default_factory=list)
    entries: list[dict[str, tuple[int, int, int]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._presence = PresenceTable(self.modalities)

    def add(self, found: TarSample) -> None:
        """Appends a sample.

        Raises:
            CorruptSampleError: if a text or vector of a sample of modalities cannot be read.
        """
        is_pair = self.modalities.is_pair
        self._presence.add(None if is_pair else contents_of(found.sample, self.modalities))
        self.keys.append(found.sample.key)
        self.entries.append(found.entries)

    def to_index(self, tar_path: Path, **counts: dict[str, int]) -> ShardIndex:
        """Builds the index.

        Args:
            tar_path: path of the tar.
            counts: `rejected` and `marked` of ShardIndex.
        """
        fields = tuple(sorted({extension for entries in self.entries for extension in entries}))
        table = np.zeros((len(self.entries), len(fields), 3), dtype=np.uint32)
        table[:, :, 0] = ABSENT
        for position, entries in enumerate(self.entries):
            for extension, entry in entries.items():
                table[position, fields.index(extension)] = entry
        with tar_path.open("rb") as tar:
            return ShardIndex(
                fields=fields,
                table=table,
                tar_bytes=tar_path.stat().st_size,
                tar_sha256=hashlib.file_digest(tar, "sha256").hexdigest(),
                long_keys=self._long_keys(tar),
                **self._presence.to_fields(),
                **counts,
            )

    def _long_keys(self, tar: BinaryIO) -> dict[int, str]:
        """Returns {position: key} for keys that only a PAX or GNU header contains."""
        long_keys = {}
        for position, (key, entries) in enumerate(zip(self.keys, self.entries, strict=True)):
            first_block = min(block for block, _, _ in entries.values())
            tar.seek((first_block - 1) * BLOCK_BYTES)
            if split_member_name(plain_member_name(tar.read(BLOCK_BYTES)))[0] != key:
                long_keys[position] = key
        return long_keys


def index_tar(task: IndexTask) -> list[str]:
    """Writes the sidecar files of a tar unless it has problems; returns the problems."""
    table, rows, left_out, marked = TarTable(task.modalities), [], [], Counter()
    try:
        for number, found in enumerate(read_tar_samples(task.tar_path), start=1):
            try:
                rows.append(_checked_row(found.sample, task=task, number=number))
                table.add(found)
                marked.update(caption_tags(found.sample) if task.modalities.is_pair else ())
            except _LeftOutError as error:
                left_out.append((found.sample.key, error.reason, str(error)))
    except BadTarError as error:
        return [str(error)]
    if left_out and not task.skip_incomplete:
        return [
            f"{task.tar_path}: sample {key}: {reason}: {detail}" for key, reason, detail in left_out
        ]
    index = table.to_index(
        task.tar_path,
        rejected=dict(Counter(reason for _, reason, _ in left_out)),
        marked=dict(marked),
    )
    task.index_path.parent.mkdir(parents=True, exist_ok=True)
    if task.measure:
        _write_rows(task, rows)
    write_atomically(task.index_path, index.to_bytes())
    return []


class _LeftOutError(ValueError):
    """Raised for a sample that the index must not contain."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def _checked_row(sample: Sample, *, task: IndexTask, number: int) -> dict[str, Any]:
    """Checks a sample and returns its Parquet row; {} if `measure` is not set.

    Raises:
        _LeftOutError: if the sample is incomplete, or its media cannot be decoded.
    """
    if task.modalities.is_pair:
        check_completeness(sample, task.modalities.media[0])
    else:
        _check_modalities(sample, task)
    if not task.measure:
        return {}
    try:
        measures = measure_sample(sample, task.modalities)
    except MediaError as error:
        raise _LeftOutError(error.reason, str(error)) from None
    return row_of_sample(
        sample,
        task.modalities,
        measures=measures,
        kept=task.kept,
        source=f"{task.name}.tar",
        source_row=number,
    )


def check_completeness(sample: Sample, media_kind: str) -> None:
    """Checks that a sample has media and a caption.

    Raises:
        _LeftOutError: if the sample has no media of this kind, or no caption.
    """
    if not any(media_kind_of(extension) == media_kind for extension in sample.members):
        found = ", ".join(sorted(sample.members))
        raise _LeftOutError("missing_media", f"expected {media_kind}, found {found}")
    try:
        captions_of(sample)
    except CorruptSampleError as error:
        raise _LeftOutError("missing_caption", str(error).removeprefix(f"{sample}: ")) from None


def _check_modalities(sample: Sample, task: IndexTask) -> None:
    try:
        contents = contents_of(sample, task.modalities)
    except CorruptSampleError as error:
        detail = str(error).removeprefix(f"{sample}: ")
        raise _LeftOutError("bad_modality", detail) from None
    if len(contents.present) < task.min_modalities:
        expected = f"expected at least {task.min_modalities} of {', '.join(task.modalities)}"
        found = ", ".join(sorted(sample.members))
        raise _LeftOutError("too_few_modalities", f"{expected}; found {found}")


def shapes_in_tar(tar_path: Path, modalities: Modalities) -> dict[str, VectorShape]:
    """Finds the shape of each vector: that of its first usable member in a tar."""
    found: dict[str, VectorShape] = {}
    wanted = {name: modalities.extensions_of(name) for name in modalities.names_of("vector")}
    with tar_path.open("rb") as tar:
        try:
            for member in read_members(tar_path):
                for name in [name for name, known in wanted.items() if member.extension in known]:
                    tar.seek(member.data_block * BLOCK_BYTES)
                    try:
                        found[name] = VectorShape.of(from_npy(tar.read(member.num_bytes)))
                        del wanted[name]
                    except VectorError:
                        continue
                if not wanted:
                    break
        except BadTarError:  # indexing reports it later
            return found
    return found


def _write_rows(task: IndexTask, rows: list[dict[str, Any]]) -> None:
    import pyarrow

    schema = schema_of(task.modalities, kept=task.kept)
    write_shard_parquet(task.parquet_path, pyarrow.Table.from_pylist(rows, schema=schema))


def kept_types_of_tar(tar_path: Path, names: tuple[str, ...]) -> dict[str, CollectedType | None]:
    """Finds the type of each key to keep in the .json members of a tar.

    The scan stops at the first damage, which indexing reports later.
    """
    types = KeptTypes(names)
    with tar_path.open("rb") as tar:
        try:
            for member in read_members(tar_path):
                if member.extension == "json":
                    values = _json_object(tar, member)
                    labels = values.get("labels")
                    types.add({**values, **(labels if isinstance(labels, dict) else {})})
        except BadTarError:
            return types.known
    return types.known


def _json_object(tar: BinaryIO, member: Member) -> dict[str, Any]:
    tar.seek(member.data_block * BLOCK_BYTES)
    try:
        values = json.loads(tar.read(member.num_bytes))
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


# ------------------------------------------------------------------------------------- samples


def read_tar_samples(path: Path) -> Iterator[TarSample]:
    """Yields the samples of a tar in order, including incomplete ones.

    Raises:
        BadTarError: in the same cases as `read_members`, or if the members of a sample are not
            adjacent, or a member or key is duplicate.
    """
    seen: set[str] = set()
    with path.open("rb") as tar:
        for key, members in _group_by_key(path):
            if key in seen:
                raise BadTarError(
                    f"{path}: sample {key}: duplicate key, or its members are not adjacent"
                )
            seen.add(key)
            yield _read_sample(Sample(shard=str(path), key=key, members={}), members, tar=tar)


def _group_by_key(path: Path) -> Iterator[tuple[str, list[Member]]]:
    group: list[Member] = []
    for member in read_members(path):
        if group and member.key != group[0].key:
            yield group[0].key, group
            group = []
        group.append(member)
    if group:
        yield group[0].key, group


def _read_sample(sample: Sample, members: list[Member], *, tar: BinaryIO) -> TarSample:
    entries: dict[str, tuple[int, int, int]] = {}
    for member in members:
        if member.extension in entries:
            raise BadTarError(f"{sample}: duplicate member .{member.extension}")
        if max(member.num_bytes, member.data_block) >= ABSENT:
            raise BadTarError(
                f"{sample}: .{member.extension}: size or offset exceeds the range of an index"
            )
        tar.seek(member.data_block * BLOCK_BYTES)
        content = tar.read(member.num_bytes)
        entries[member.extension] = (member.data_block, member.num_bytes, zlib.crc32(content))
        sample.members[member.extension] = content
    return TarSample(sample=sample, entries=entries)
