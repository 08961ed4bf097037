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

from data_prep.shards.index import (
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.parquet import media_extension
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    captions_of,
    media_kind_of,
)
from data_prep.shards.tar_members import Member, find_members
from data_prep.verify.indexed_tar import TarContent, read_indexed


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
    tar_path: Path, index: ShardIndex, *, is_as_recorded: bool, keys_of_media: Mapping[str, str]
) -> SavedSamples:
    """The samples whose members all carry the crc32 that the tar's old index has for them.

    Args:
        tar_path: a tar, damaged or not, with members in any order.
        index: of the tar as it once was.
        is_as_recorded: whether the index has the sha256 of the manifest. If not, its names of
            extensions may be wrong, and the headers of the tar must agree with them.
        keys_of_media: sha256 of the media -> key, for samples of which no header can be read.
    """
    found: dict[int, tuple[str, dict[str, Member]]] = {}
    labels: dict[int, str] = {}
    with tar_path.open("rb") as tar:
        for place in range(index.num_samples):
            sample = read_indexed(tar, index, place, content=TarContent())
            key = sample.key or _key_by_media(sample.members, keys_of_media)
            labels[place] = key or f"number {place}"
            is_certain = is_as_recorded or not sample.problems
            if key is not None and sample.has_all_bytes and is_certain:
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
    members_of, _ = group_members(tar_path)
    with tar_path.open("rb") as tar:
        for key, members in members_of.items():
            if key in taken:
                continue
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
    tar_path: Path, *, media_kind: str, recorded: Mapping[str, tuple[str, list[str]]]
) -> SavedSamples:
    """The samples that have media and captions, which are compared with what is recorded of them.

    Args:
        tar_path: a tar, damaged or not, with members in any order.
        media_kind: "image" or "audio".
        recorded: key -> (sha256 of its media, its captions), as far as they are known.
    """
    groups, left_out = group_members(tar_path)
    saved = SavedSamples(lost=left_out)
    with tar_path.open("rb") as tar:
        for key, members in groups.items():
            sample = _read_sample(tar, key, members)
            found = _media_and_captions(sample, media_kind)
            if found is not None and found == recorded.get(key, found):
                saved.places[key] = members
            else:
                saved.lost.append(key)
    return saved


def _media_and_captions(sample: Sample, media_kind: str) -> tuple[str, list[str]] | None:
    """(sha256 of the media, captions); None if one of them is missing or cannot be read."""
    if not any(media_kind_of(extension) == media_kind for extension in sample.members):
        return None
    try:
        captions = captions_of(sample)
    except CorruptSampleError:
        return None
    content = sample.members[media_extension(sample, media_kind)]
    return hashlib.sha256(content).hexdigest(), captions


def group_members(tar_path: Path) -> tuple[dict[str, dict[str, Member]], list[str]]:
    """(key -> extension -> member, in order of first appearance; keys that are left out)

    Members that stand apart are joined; of a sample that stands twice the first is taken. A sample
    with damage between its members is left out, because one of them may be lost; one beside damage
    too, unless it has every extension that occurs in the tar.
    """
    runs, torn, beside_damage = _runs_of_members(tar_path)
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
        if key in torn or (key in beside_damage and members.keys() != extensions)
    ]
    for key in left_out:
        del groups[key]
    return groups, left_out


def _runs_of_members(
    tar_path: Path,
) -> tuple[list[tuple[str, dict[str, Member]]], set[str], set[str]]:
    """(key and members that stand side by side, keys torn by damage, keys beside damage)"""
    runs: list[tuple[str, dict[str, Member]]] = []
    torn: set[str] = set()
    beside_damage: set[str] = set()
    is_behind_damage = False
    for member in find_members(tar_path):
        last_key, last_run = runs[-1] if runs else (None, {})
        if member is None:
            is_behind_damage = True
            beside_damage |= {last_key} if last_key is not None else set()
            continue
        if last_key == member.key and member.extension not in last_run:
            last_run[member.extension] = member
            torn |= {member.key} if is_behind_damage else set()
        else:
            runs.append((member.key, {member.extension: member}))
            beside_damage |= {member.key} if is_behind_damage else set()
        is_behind_damage = False
    return runs, torn, beside_damage
