"""Content of a tar, read by its headers or by an index."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.modalities.modality import Modalities
from data_prep.shards.index import (
    ABSENT,
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.tar_members import BadTarError, Member, member_at, read_members

PROBLEMS_NAMED = 3  # limit per tar and kind; further problems are only counted


@dataclass
class TarContent:
    """The members found by a walk over a tar, and their problems."""

    keys: list[str] = field(default_factory=list)
    num_members: Counter[str] = field(default_factory=Counter)  # key -> number of members
    members: dict[int, Member] = field(default_factory=dict)  # data block -> member
    problems: list[str] = field(default_factory=list)


def walk_tar(path: Path) -> TarContent:
    """Lists the members up to the first damage, with problems of their order and keys."""
    content = TarContent()
    disorder: list[str] = []
    extensions: set[str] = set()
    try:
        for member in read_members(path):
            key = member.key
            if not content.keys or key != content.keys[-1]:
                if key in content.num_members:
                    disorder.append(
                        f"{path}: sample {key}: duplicate key, or its members are not adjacent"
                    )
                content.keys.append(key)
                extensions = set()
            if member.extension in extensions:
                disorder.append(f"{path}: sample {key}: duplicate member .{member.extension}")
            extensions.add(member.extension)
            content.num_members[key] += 1
            content.members[member.data_block] = member
    except BadTarError as error:
        content.problems.append(str(error))
    content.problems += disorder[:PROBLEMS_NAMED]
    if len(disorder) > PROBLEMS_NAMED:
        content.problems.append(f"{path}: {len(disorder) - PROBLEMS_NAMED} more of this kind")
    return content


@dataclass
class IndexedSample:
    """The members at the offsets that an index records for a sample."""

    key: str | None  # None: none of its headers is readable
    num_members: int
    members: dict[str, bytes] = field(default_factory=dict)  # members with a matching CRC32
    problems: list[str] = field(default_factory=list)
    shifts: dict[str, int] = field(default_factory=dict)  # of members that damage has moved

    @property
    def has_all_bytes(self) -> bool:
        """Whether all members match their CRC32, even if their headers are damaged."""
        return len(self.members) == self.num_members


def read_indexed(
    tar: BinaryIO, index: ShardIndex, position: int, *, content: TarContent, shift: int = 0
) -> IndexedSample:
    """Reads a sample of a tar by its index, and records all problems.

    Args:
        tar: tar opened in binary mode.
        index: index of the tar before it was damaged.
        position: row of the sample in the index.
        content: result of `walk_tar`, which includes names that are too long for a ustar header.
        shift: number of bytes by which damage has moved the members behind it.
    """
    entries = index.entries_at(position)
    headers: dict[str, Member | None] = {}
    payloads: dict[str, bytes] = {}
    shifts: dict[str, int] = {}
    for extension, (block, num_bytes, crc32) in entries.items():
        start = max(block - 1, 0) * BLOCK_BYTES
        both = _read_at(tar, start, num_bytes)
        if shift and zlib.crc32(both[BLOCK_BYTES:]) != crc32:
            moved = _read_at(tar, max(start + shift, 0), num_bytes)
            if zlib.crc32(moved[BLOCK_BYTES:]) == crc32:
                both, shifts[extension] = moved, shift
        found = content.members.get(block) or member_at(both[:BLOCK_BYTES], data_block=block)
        headers[extension], payloads[extension] = found, both[BLOCK_BYTES:]
    keys = [header.key for header in headers.values() if header is not None]
    key = index.long_keys.get(position) or next(iter(keys), None)
    sample = IndexedSample(key, num_members=len(entries), shifts=shifts)
    for extension, (block, num_bytes, crc32) in entries.items():
        header, payload = headers[extension], payloads[extension]
        if header is None or (header.key, header.extension) != (key, extension):
            sample.problems.append(f".{extension}: no such member at block {block}")
        elif header.num_bytes != num_bytes:
            found_bytes = f"found {header.num_bytes}"
            sample.problems.append(f".{extension}: expected {num_bytes} bytes, {found_bytes}")
        elif len(payload) != num_bytes or zlib.crc32(payload) != crc32:
            sample.problems.append(f".{extension}: CRC32 mismatch with the index")
        if len(payload) == num_bytes and zlib.crc32(payload) == crc32:
            sample.members[extension] = payload
    return sample


def _read_at(tar: BinaryIO, start: int, num_bytes: int) -> bytes:
    """Reads the header and the content of a member."""
    tar.seek(start)
    return tar.read(BLOCK_BYTES + num_bytes)


def member_sizes(index: ShardIndex, modalities: Modalities, name: str) -> list[int]:
    """Returns the size in bytes of each sample's member of a modality; 0 if it has none."""
    sizes = np.zeros(index.num_samples, dtype=np.int64)
    wanted = modalities.extensions_of(name)
    for column, extension in reversed(list(enumerate(index.fields))):
        if extension in wanted:
            is_present = index.table[:, column, 0] != ABSENT
            sizes[is_present] = index.table[is_present, column, 1]
    return sizes.tolist()
