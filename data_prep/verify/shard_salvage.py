"""Selection of the samples that can be recovered from a damaged or unordered tar.

With the old index of the tar, a sample is recovered if all its members match their CRC32; they may
be anywhere in the tar. Without an index, a sample is recovered if the headers show that it is
complete.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.modalities.modality import Modalities
from data_prep.shards.index import (
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.parquet import signature_of
from data_prep.shards.sample import Sample
from data_prep.shards.tar_members import Member, find_members
from data_prep.verify.indexed_tar import TarContent, read_indexed


@dataclass
class SavedSamples:
    """The samples of a tar to write to a new tar, and the lost samples."""

    # Key -> extension -> member.
    members: dict[str, dict[str, Member]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)  # keys, or positions if a key is unreadable
    # Key -> extension -> number of bytes by which damage has moved the member.
    shifts: dict[str, dict[str, int]] = field(default_factory=dict)

    def read(self, tar_path: Path) -> Iterator[Sample]:
        """Yields the saved samples in order."""
        with tar_path.open("rb") as tar:
            for key, members in self.members.items():
                yield _read_sample(tar, key, members, shifts=self.shifts.get(key, {}))


def _read_sample(
    tar: BinaryIO, key: str, members: Mapping[str, Member], *, shifts: Mapping[str, int]
) -> Sample:
    contents = {}
    for extension in sorted(members):
        tar.seek(members[extension].data_block * BLOCK_BYTES + shifts.get(extension, 0))
        contents[extension] = tar.read(members[extension].num_bytes)
    return Sample(shard=tar.name, key=key, members=contents)


def save_by_index(
    tar_path: Path,
    index: ShardIndex,
    *,
    is_as_recorded: bool,
    keys_of_media: Mapping[str, str],
    recorded_keys: Sequence[str],
) -> SavedSamples:
    """Selects the samples whose members all match their CRC32 in the old index of the tar.

    Args:
        tar_path: path of the tar, whose members may be damaged and in any order.
        index: index of the tar before it was damaged.
        is_as_recorded: whether the index has the sha256 that the manifest records. Otherwise its
            extensions may be wrong and must agree with the headers of the tar.
        keys_of_media: mapping from sha256 of the media to key, for samples without a readable
            header.
        recorded_keys: keys of the samples in order; empty if they are unknown.
    """
    saved = SavedSamples()
    shift = tar_path.stat().st_size - index.tar_bytes  # of what stands after lost or added bytes
    found: dict[int, tuple[str, dict[str, Member]]] = {}
    labels: dict[int, str] = {}
    with tar_path.open("rb") as tar:
        for position in range(index.num_samples):
            sample = read_indexed(tar, index, position, content=TarContent(), shift=shift)
            key = sample.key or _key_by_media(sample.members, keys_of_media)
            labels[position] = key if key and sample.members else f"number {position}"
            is_certain = is_as_recorded or not sample.problems
            if key is not None and sample.has_all_bytes and is_certain:
                saved.shifts[key] = sample.shifts
                entries = index.entries_at(position).items()
                found[position] = (
                    key,
                    {
                        name: Member(f"{key}.{name}", block, num_bytes)
                        for name, (block, num_bytes, _) in entries
                    },
                )
    labels |= dict(enumerate(recorded_keys))
    missing = [each for each in range(index.num_samples) if each not in found]
    found |= _find_elsewhere(tar_path, index, missing, taken={key for key, _ in found.values()})
    for position in range(index.num_samples):
        if position in found and found[position][0] not in saved.members:
            saved.members[found[position][0]] = found[position][1]
        else:
            saved.lost.append(labels[position])
    return saved


def _key_by_media(members: Mapping[str, bytes], keys_of_media: Mapping[str, str]) -> str | None:
    keys = (keys_of_media.get(hashlib.sha256(each).hexdigest()) for each in members.values())
    return next((key for key in keys if key is not None), None)


def _find_elsewhere(
    tar_path: Path, index: ShardIndex, missing: list[int], *, taken: set[str]
) -> dict[int, tuple[str, dict[str, Member]]]:
    """Finds samples of the index whose members are at other offsets of the tar."""
    if not missing:
        return {}
    groups: defaultdict[frozenset, deque[str]] = defaultdict(deque)
    members_of, _ = group_members(tar_path)
    with tar_path.open("rb") as tar:
        for key, members in members_of.items():
            if key in taken:
                continue
            contents = _read_sample(tar, key, members, shifts={}).members
            checksums = {(name, len(each), zlib.crc32(each)) for name, each in contents.items()}
            groups[frozenset(checksums)].append(key)
    found = {}
    for position in missing:
        entries = index.entries_at(position).items()
        keys = groups.get(frozenset((name, size, crc32) for name, (_, size, crc32) in entries))
        if keys:
            key = keys.popleft()
            found[position] = key, members_of[key]
    return found


def save_by_headers(
    tar_path: Path, *, modalities: Modalities, recorded: Mapping[str, tuple[Any, ...]]
) -> SavedSamples:
    """Selects the samples whose media, vectors and texts agree with the recorded ones.

    Args:
        tar_path: path of the tar, whose members may be damaged and in any order.
        modalities: modalities of the dataset.
        recorded: mapping from key to the result of `signature_in`. Samples without an entry are
            accepted.
    """
    groups, left_out = group_members(tar_path)
    saved = SavedSamples(lost=left_out)
    with tar_path.open("rb") as tar:
        for key, members in groups.items():
            sample = _read_sample(tar, key, members, shifts={})
            found = signature_of(sample, modalities)
            if found is not None and found == recorded.get(key, found):
                saved.members[key] = members
            else:
                saved.lost.append(key)
    return saved


def group_members(tar_path: Path) -> tuple[dict[str, dict[str, Member]], list[str]]:
    """Groups the members of a tar by sample.

    Members that are not adjacent are joined. If samples are duplicate, the first is used. A sample
    with damage between its members is omitted, because a member may be lost. A sample next to
    damage is also omitted, unless it has every extension that occurs in the tar.

    Returns:
        ({key: {extension: member}} in order of first appearance, omitted keys)
    """
    runs, torn, next_to_damage = _runs_of_members(tar_path)
    groups: dict[str, dict[str, Member]] = {}
    for key, members in runs:
        if key not in groups:
            groups[key] = members
        elif groups[key].keys().isdisjoint(members):
            groups[key] |= members
    extensions = {extension for members in groups.values() for extension in members}
    left_out = [
        key
        for key, members in groups.items()
        if key in torn or (key in next_to_damage and members.keys() != extensions)
    ]
    for key in left_out:
        del groups[key]
    return groups, left_out


def _runs_of_members(
    tar_path: Path,
) -> tuple[list[tuple[str, dict[str, Member]]], set[str], set[str]]:
    """Returns (runs of adjacent members with a key, keys split by damage, keys next to damage)."""
    runs: list[tuple[str, dict[str, Member]]] = []
    torn: set[str] = set()
    next_to_damage: set[str] = set()
    is_after_damage = False
    for member in find_members(tar_path):
        last_key, last_run = runs[-1] if runs else (None, {})
        if member is None:
            is_after_damage = True
            next_to_damage |= {last_key} if last_key is not None else set()
            continue
        if last_key == member.key and member.extension not in last_run:
            last_run[member.extension] = member
            torn |= {member.key} if is_after_damage else set()
        else:
            runs.append((member.key, {member.extension: member}))
            next_to_damage |= {member.key} if is_after_damage else set()
        is_after_damage = False
    return runs, torn, next_to_damage
