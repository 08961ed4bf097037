"""Re-reads a dataset against its manifest and index, and names each shard and key that differs.

    python -m data_prep.verify_shards configs/data_prep/verify.yaml dataset=demo/datasets/x

Per shard: sizes and sha256 of the tar and the index; every header of the tar; that the members of
a sample stand side by side under a key of their own; that each is where the index says, with its
crc32.
"""

from __future__ import annotations

import hashlib
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.config import VerifyShards
from data_prep.config_file import InputError, run_command
from data_prep.media_decode import MediaError
from data_prep.pair_shard import MEDIA_CHECKS
from data_prep.shard_format import (
    ABSENT,
    BLOCK_BYTES,
    CorruptSampleError,
    DatasetInfo,
    ManifestRow,
    Sample,
    ShardIndex,
    captions_of,
    fingerprint_of,
    media_kind_of,
    read_dataset_files,
)
from data_prep.tar_members import BadTarError, Member, read_members
from data_prep.worker_pool import run_tasks

NUM_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class ShardCheck:
    """What a worker needs to verify one shard."""

    folder: Path
    tar_folder: Path
    row: ManifestRow
    media_kind: str
    decode: bool

    @property
    def tar_path(self) -> Path:
        return self.tar_folder / f"{self.row.name}.tar"

    @property
    def index_path(self) -> Path:
        return self.folder / f"{self.row.name}.idx"


@dataclass
class TarContent:
    """What a walk over a tar found."""

    keys: list[str] = field(default_factory=list)
    members: dict[int, Member] = field(default_factory=dict)  # by data block
    problems: list[str] = field(default_factory=list)


def verify_shards(config: VerifyShards) -> None:
    """Prints a summary of a dataset that is as it was made.

    Raises:
        InputError: listing what is wrong, by shard and key.
    """
    info, manifest = read_dataset_files(config.dataset)
    problems = _check_totals(config.dataset, info, manifest)
    checks = [
        ShardCheck(
            folder=config.dataset,
            tar_folder=config.dataset / info.tar_folder,
            row=row,
            media_kind=info.media,
            decode=config.decode,
        )
        for row in manifest
    ]
    with tqdm(total=len(checks), unit="shard", desc="verifying", disable=None) as bar:
        for found in run_tasks(verify_shard, checks, workers=config.workers):
            problems += found
            bar.update()
    if problems:
        raise InputError(_problem_list(config.dataset, sorted(problems)))
    decoded = ", and all media and captions decode" if config.decode else ""
    print(  # noqa: T201
        f"{config.dataset}: {info.num_samples:,} samples in {len(manifest)} shards, "
        f"{info.tar_bytes / 1e6:,.1f} MB: sizes, checksums, headers and keys are as recorded"
        f"{decoded}"
    )


def _problem_list(dataset: Path, problems: list[str]) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:NUM_PROBLEMS_SHOWN])
    more = len(problems) - NUM_PROBLEMS_SHOWN
    return (
        f"{dataset}: {len(problems)} problems\n{shown}\n"
        + (f"  and {more} more\n" if more > 0 else "")
        + "restore the shards named, or delete each with its .idx and make or index it again"
    )


def _check_totals(folder: Path, info: DatasetInfo, manifest: list[ManifestRow]) -> list[str]:
    expected = {
        "num_shards": len(manifest),
        "num_samples": sum(row.num_samples for row in manifest),
        "tar_bytes": sum(row.tar_bytes for row in manifest),
        "fingerprint": fingerprint_of(manifest),
    }
    return [
        f"{folder / 'dataset.json'}: expected {name} {value} (manifest.jsonl), "
        f"found {getattr(info, name)}"
        for name, value in expected.items()
        if getattr(info, name) != value
    ]


# ----------------------------------------------------------------------------------- one shard


def verify_shard(check: ShardCheck) -> list[str]:
    """What is wrong with one shard; empty when it is as it was made."""
    problems = _check_file(check.tar_path, check.row.tar_bytes, check.row.tar_sha256)
    problems += _check_file(check.index_path, check.row.index_bytes, check.row.index_sha256)
    if not check.tar_path.exists():
        return problems
    content = _walk(check.tar_path)
    problems += content.problems
    try:
        index = ShardIndex.read(check.index_path)
    except InputError as error:
        return [*problems, str(error)]
    if index.tar_sha256 != check.row.tar_sha256:
        problems.append(f"{check.index_path}: belongs to another tar than the manifest records")
    problems += _check_counts(check, index, content)
    with check.tar_path.open("rb") as tar:
        for place in range(index.num_samples):
            problems += _check_sample(check, index, place, content=content, tar=tar)
    return problems


def _check_file(path: Path, num_bytes: int, sha256: str) -> list[str]:
    if not path.exists():
        return [f"{path}: missing"]
    found = path.stat().st_size
    if found != num_bytes:
        return [f"{path}: expected {num_bytes} bytes, found {found}"]
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            return [f"{path}: its sha256 is not the one in manifest.jsonl"]
    return []


def _walk(path: Path) -> TarContent:
    content = TarContent()
    seen: set[str] = set()
    try:
        for member in read_members(path):
            if not content.keys or member.key != content.keys[-1]:
                if member.key in seen:
                    content.problems.append(
                        f"{path}: sample {member.key}: its members are not side by side, or "
                        "its key stands twice"
                    )
                seen.add(member.key)
                content.keys.append(member.key)
            content.members[member.data_block] = member
    except BadTarError as error:
        content.problems.append(str(error))
    return content


def _check_counts(check: ShardCheck, index: ShardIndex, content: TarContent) -> list[str]:
    problems = []
    if index.num_samples != check.row.num_samples:
        problems.append(
            f"{check.index_path}: expected {check.row.num_samples} samples (manifest.jsonl), "
            f"found {index.num_samples}"
        )
    # An index of a foreign tar may leave out incomplete samples, which it counts.
    left_out = len(content.keys) - index.num_samples
    if not content.problems and not 0 <= left_out <= sum(index.rejected.values()):
        problems.append(
            f"{check.tar_path}: expected {index.num_samples} samples (its index), found "
            f"{len(content.keys)}"
        )
    return problems


def _check_sample(
    check: ShardCheck, index: ShardIndex, place: int, *, content: TarContent, tar: Any
) -> Iterator[str]:
    entries = {
        extension: entry
        for extension, entry in zip(index.fields, index.table[place].tolist(), strict=True)
        if entry[0] != ABSENT
    }
    found = [content.members.get(block) for block, _, _ in entries.values()]
    key = next((member.key for member in found if member is not None), f"number {place}")
    sample = Sample(shard=str(check.tar_path), key=key, members={})
    for (extension, (block, num_bytes, crc32)), member in zip(entries.items(), found, strict=True):
        if member is None or (member.key, member.extension) != (key, extension):
            yield f"{sample}: .{extension}: there is no such member at block {block}"
            continue
        tar.seek(block * BLOCK_BYTES)
        sample.members[extension] = tar.read(num_bytes)
        if member.num_bytes != num_bytes:
            yield f"{sample}: .{extension}: expected {num_bytes} bytes, found {member.num_bytes}"
        elif zlib.crc32(sample.members[extension]) != crc32:
            yield f"{sample}: .{extension}: its bytes have not the crc32 of the index"
    if check.decode:
        yield from _check_decoding(sample, check.media_kind)


def _check_decoding(sample: Sample, media_kind: str) -> Iterator[str]:
    try:
        captions_of(sample)
    except CorruptSampleError as error:
        yield str(error)
    media = [name for name in sample.members if media_kind_of(name) == media_kind]
    if not media:
        yield f"{sample}: holds no {media_kind}"
    for extension in media:
        try:
            MEDIA_CHECKS[media_kind](sample.members[extension], extension)
        except MediaError as error:
            yield f"{sample}: .{extension}: {error}"


# ------------------------------------------------------------------------------------- command


def print_plan(config: VerifyShards) -> None:
    """Prints what would be read.

    Raises:
        InputError: there is no dataset.
    """
    info, manifest = read_dataset_files(config.dataset)
    print(  # noqa: T201
        f"would verify {len(manifest)} shards with {info.num_samples:,} samples, "
        f"{info.tar_bytes / 1e6:,.1f} MB"
    )


def main() -> int:
    """The command."""
    return run_command(VerifyShards, run=verify_shards, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
