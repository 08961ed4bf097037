"""Which samples of a damaged or disordered tar can still be saved.

With the tar's old index: those whose members all carry their crc32, at their place or, in a tar
that was rewritten, anywhere. Without one: those that are complete by the headers of the tar.
"""

from __future__ import annotations

import hashlib
import zlib
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data_prep.indexed_tar import TarContent, read_indexed
from data_prep.shard_format import (
    BLOCK_BYTES,
    CorruptSampleError,
    Sample,
    ShardIndex,
    captions_of,
    media_kind_of,
)
from data_prep.shard_parquet import media_extension
from data_prep.tar_members import Member, find_members


@dataclass
class SavedSamples:
    """What of a tar is to be written anew."""

    places: dict[str, dict[str, Member]] = field(default_factory=dict)  # key -> extension -> member
    lost: list[str] = field(default_factory=list)  # keys, or numbers where a key cannot be read

    def read(self, tar_path: Path) -> Iterator[Sample]:
        """The samples in order."""
        with tar_path.open("rb") as tar:
            for key, members in self.places.items():
                yield _read_sample(tar, key, members)


def _read_sample(tar: BinaryIO, key: str, members: Mapping[str, Member]) -> Sample:
    contents = {}
    for extension in sorted(members):
        tar.seek(members[extension].data_block * BLOCK_BYTES)
        contents[extension] = tar.read(members[extension].num_bytes)
    return Sample(shard=tar.name, key=key, members=contents)


def save_by_index(
    tar_path: Path, index: ShardIndex, *, keys_of_media: Mapping[str, str]
) -> SavedSamples:
    """The samples whose members all carry the crc32 that the tar's old index has for them.

    Args:
        tar_path: a tar, damaged or not, with members in any order.
        index: of the tar as it once was.
        keys_of_media: sha256 of the media -> key, for samples of which no header can be read.
    """
    found: dict[int, tuple[str, dict[str, Member]]] = {}
    labels: dict[int, str] = {}
    with tar_path.open("rb") as tar:
        for place in range(index.num_samples):
            sample = read_indexed(tar, index, place, content=TarContent())
            key = sample.key or _key_by_media(sample.members, keys_of_media)
            labels[place] = key or f"number {place}"
            if key is not None and sample.has_all_bytes:
                entries = index.entries_at(place).items()
                found[place] = (
                    key,
                    {
                        name: Member(f"{key}.{name}", block, num_bytes)
                        for name, (block, num_bytes, _) in entries
                    },
                )
    missing = [place for place in range(index.num_samples) if place not in found]
    found |= _find_elsewhere(tar_path, index, missing, taken={key for key, _ in found.values()})
    saved = SavedSamples()
    for place in range(index.num_samples):
        if place in found and found[place][0] not in saved.places:
            saved.places[found[place][0]] = found[place][1]
        else:
            saved.lost.append(labels[place])
    return saved


def _key_by_media(members: Mapping[str, bytes], keys_of_media: Mapping[str, str]) -> str | None:
    media = (content for name, content in members.items() if media_kind_of(name))
    keys = (keys_of_media.get(hashlib.sha256(content).hexdigest()) for content in media)
    return next((key for key in keys if key is not None), None)


def _find_elsewhere(
    tar_path: Path, index: ShardIndex, places: list[int], *, taken: set[str]
) -> dict[int, tuple[str, dict[str, Member]]]:
    """Samples of the index whose members stand at other places of the tar."""
    if not places:
        return {}
    groups: defaultdict[frozenset, deque[str]] = defaultdict(deque)
    members_of = {key: members for key, members in group_members(tar_path) if key not in taken}
    with tar_path.open("rb") as tar:
        for key, members in members_of.items():
            contents = _read_sample(tar, key, members).members
            checksums = {(name, len(each), zlib.crc32(each)) for name, each in contents.items()}
            groups[frozenset(checksums)].append(key)
    found = {}
    for place in places:
        entries = index.entries_at(place).items()
        keys = groups.get(frozenset((name, size, crc32) for name, (_, size, crc32) in entries))
        if keys:
            key = keys.popleft()
            found[place] = key, members_of[key]
    return found


def save_by_headers(
    tar_path: Path, *, media_kind: str, sha256_of_media: Mapping[str, str]
) -> SavedSamples:
    """The samples that have media and caption; nothing tells whether all their bytes are right.

    Args:
        tar_path: a tar, damaged or not, with members in any order.
        media_kind: "image" or "audio".
        sha256_of_media: key -> sha256 of its media, as far as they are known.
    """
    saved = SavedSamples()
    with tar_path.open("rb") as tar:
        for key, members in group_members(tar_path):
            sample = _read_sample(tar, key, members)
            if _is_complete(sample, media_kind) and _has_sha256(
                sample, media_kind, sha256_of_media.get(key)
            ):
                saved.places[key] = members
            else:
                saved.lost.append(key)
    return saved


def _is_complete(sample: Sample, media_kind: str) -> bool:
    try:
        captions_of(sample)
    except CorruptSampleError:
        return False
    return any(media_kind_of(extension) == media_kind for extension in sample.members)


def _has_sha256(sample: Sample, media_kind: str, sha256: str | None) -> bool:
    content = sample.members[media_extension(sample, media_kind)]
    return sha256 is None or hashlib.sha256(content).hexdigest() == sha256


def group_members(tar_path: Path) -> list[tuple[str, dict[str, Member]]]:
    """(key, extension -> member) of each sample, in order of first appearance.

    Members that stand apart are joined; of a sample that stands twice the first is taken; one with
    damage between its members is left out, because one of them may be lost.
    """
    runs: list[tuple[str, dict[str, Member]]] = []
    torn: set[str] = set()
    is_behind_damage = False
    for member in find_members(tar_path):
        if member is None:
            is_behind_damage = True
            continue
        if runs and runs[-1][0] == member.key and member.extension not in runs[-1][1]:
            runs[-1][1][member.extension] = member
            if is_behind_damage:
                torn.add(member.key)
        else:
            runs.append((member.key, {member.extension: member}))
        is_behind_damage = False
    groups: dict[str, dict[str, Member]] = {}
    for key, members in runs:
        if key not in groups:
            groups[key] = members
        elif groups[key].keys().isdisjoint(members):
            groups[key] |= members
    return [(key, members) for key, members in groups.items() if key not in torn]
