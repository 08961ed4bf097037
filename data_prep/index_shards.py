"""Makes the index, the manifest and dataset.json for tars that others made, without touching them.

    python -m data_prep.index_shards configs/data_prep/index.yaml input=/data/tars output=/data/x

Reads tars of WebDataset's ShardWriter, of img2dataset, or of plain `tar`, uncompressed, and refuses
what could be misread later: cut or damaged tars, links, names that lead out of a folder, samples
whose members are not side by side, and (unless skip_incomplete) samples without media or caption.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.config import IndexShards
from data_prep.config_file import InputError, check_output_folder, fixed_values, run_command
from data_prep.dataset_folder import (
    begin_plan,
    check_plan,
    finish_dataset,
    is_finished,
    lock_folder,
    sum_rejected,
)
from data_prep.shard_format import (
    ABSENT,
    BLOCK_BYTES,
    CorruptSampleError,
    Sample,
    ShardIndex,
    captions_of,
    media_kind_of,
    plain_member_name,
    split_member_name,
    write_atomically,
)
from data_prep.tar_members import BadTarError, Member, read_members
from data_prep.worker_pool import run_tasks

NUM_PROBLEMS_SHOWN = 20


@dataclass(frozen=True)
class IndexTask:
    """What a worker needs to index one tar."""

    tar_path: Path
    index_path: Path
    media_kind: str
    skip_incomplete: bool


@dataclass(frozen=True)
class TarSample:
    """The members of one sample and what is missing from it."""

    key: str
    entries: dict[str, tuple[int, int, int]]  # extension -> data block, size in bytes, crc32
    reason: str | None  # why it is incomplete


def index_shards(config: IndexShards) -> None:
    """Writes the sidecars of all tars.

    Raises:
        InputError: there are no tars, or listing what is wrong with them, by shard and key.
    """
    check_output_folder(config.output, key="output")
    folder, names = find_tars(config.input)
    tasks = _tasks(config, folder, names)
    with lock_folder(config.output):
        begin_plan(config.output, _plan(config))
        todo = [task for task in tasks if not _is_indexed(task)]
        problems: list[str] = []
        with tqdm(total=len(todo), unit="shard", desc="indexing", disable=None) as bar:
            for found in run_tasks(index_tar, todo, workers=config.workers):
                problems += found
                bar.update()
        if problems:
            raise InputError(_problem_list(config, sorted(problems)))
        _refuse_empty(config, tasks)
        info = finish_dataset(
            config.output,
            names,
            media=config.media,
            preparation=_plan(config),
            tar_folder=os.path.relpath(folder, config.output),
        )
    left_out = f"; left out: {info.rejected}" if info.rejected else ""
    print(  # noqa: T201
        f"{config.output}: {info.num_samples:,} samples in {info.num_shards} shards, "
        f"{info.tar_bytes / 1e6:,.1f} MB, indexed{left_out}"
    )


def _refuse_empty(config: IndexShards, tasks: list[IndexTask]) -> None:
    indexes = [ShardIndex.read(task.index_path) for task in tasks]
    if not any(index.num_samples for index in indexes):
        left_out = dict(sum_rejected(indexes))
        raise InputError(
            f"{config.input}: no sample with {config.media} and a caption; left out: {left_out}; "
            f"check media={config.media}"
        )


def find_tars(pattern: str) -> tuple[Path, list[str]]:
    """(folder that holds all tars, their paths from there without .tar, sorted)

    Raises:
        InputError: nothing was found, or a file that is not called .tar.
    """
    if Path(pattern).is_dir():
        pattern = str(Path(pattern) / "*.tar")
    paths = sorted(Path(path) for path in glob.glob(pattern, recursive=True))  # noqa: PTH207
    others = [path for path in paths if path.suffix != ".tar"]
    if others or not paths:
        found = f"found {others[0]}" if others else "found none"
        raise InputError(f"{pattern}: expected uncompressed .tar files (input), {found}")
    folder = Path(os.path.commonpath([path.parent for path in paths]))
    return folder, [path.relative_to(folder).as_posix().removesuffix(".tar") for path in paths]


def _tasks(config: IndexShards, folder: Path, names: list[str]) -> list[IndexTask]:
    return [
        IndexTask(
            tar_path=folder / f"{name}.tar",
            index_path=config.output / f"{name}.idx",
            media_kind=config.media,
            skip_incomplete=config.skip_incomplete,
        )
        for name in names
    ]


def _plan(config: IndexShards) -> dict[str, Any]:
    return {"command": "index_shards", "config": fixed_values(config)}


def _is_indexed(task: IndexTask) -> bool:
    if not is_finished(task.index_path, task.tar_path):
        return False
    return task.index_path.stat().st_mtime_ns >= task.tar_path.stat().st_mtime_ns


def _problem_list(config: IndexShards, problems: list[str]) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:NUM_PROBLEMS_SHOWN])
    more = len(problems) - NUM_PROBLEMS_SHOWN
    advice = "make these tars again (tar --sort=name keeps the members of a sample side by side)"
    if any("missing_" in problem for problem in problems):
        advice += "; samples that are only incomplete can be left out with skip_incomplete=true"
    return (
        f"{config.input}: problems found: {len(problems)}\n{shown}\n"
        + (f"  and {more} more\n" if more > 0 else "")
        + advice
    )


# ------------------------------------------------------------------------------------- one tar


def index_tar(task: IndexTask) -> list[str]:
    """Writes the index of one tar; returns what is wrong, in which case nothing is written."""
    try:
        samples = list(_read_samples(task))
    except BadTarError as error:
        return [str(error)]
    incomplete = [sample for sample in samples if sample.reason]
    if incomplete and not task.skip_incomplete:
        return [f"{task.tar_path}: sample {each.key}: {each.reason}" for each in incomplete]
    complete = [sample for sample in samples if not sample.reason]
    with task.tar_path.open("rb") as tar:
        sha256 = hashlib.file_digest(tar, "sha256").hexdigest()
        fields, table = _table(complete)
        index = ShardIndex(
            fields=fields,
            table=table,
            tar_bytes=task.tar_path.stat().st_size,
            tar_sha256=sha256,
            rejected=dict(Counter(sample.reason.partition(":")[0] for sample in incomplete)),
            long_keys=_long_keys(tar, complete),
        )
    task.index_path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(task.index_path, index.to_bytes())
    return []


def _read_samples(task: IndexTask) -> Iterator[TarSample]:
    seen: set[str] = set()
    with task.tar_path.open("rb") as tar:
        for key, members in _group_by_key(task.tar_path):
            if key in seen:
                raise BadTarError(
                    f"{task.tar_path}: sample {key}: its members are not side by side, or its key "
                    "stands twice"
                )
            seen.add(key)
            yield _read_sample(task, key, members, tar=tar)


def _group_by_key(path: Path) -> Iterator[tuple[str, list[Member]]]:
    group: list[Member] = []
    for member in read_members(path):
        if group and member.key != group[0].key:
            yield group[0].key, group
            group = []
        group.append(member)
    if group:
        yield group[0].key, group


def _read_sample(task: IndexTask, key: str, members: list[Member], *, tar: Any) -> TarSample:
    entries: dict[str, tuple[int, int, int]] = {}
    sample = Sample(shard=str(task.tar_path), key=key, members={})
    for member in members:
        if member.extension in entries:
            raise BadTarError(f"{sample}: .{member.extension} stands twice")
        if max(member.num_bytes, member.data_block) >= ABSENT:
            raise BadTarError(f"{sample}: .{member.extension} is beyond what an index can hold")
        tar.seek(member.data_block * BLOCK_BYTES)
        content = tar.read(member.num_bytes)
        entries[member.extension] = (member.data_block, member.num_bytes, zlib.crc32(content))
        if member.extension in ("txt", "json"):
            sample.members[member.extension] = content
    reason = _what_is_missing(sample, list(entries), media_kind=task.media_kind)
    return TarSample(key=key, entries=entries, reason=reason)


def _what_is_missing(sample: Sample, extensions: list[str], *, media_kind: str) -> str | None:
    if not any(media_kind_of(extension) == media_kind for extension in extensions):
        return f"missing_media: expected {media_kind}, found {', '.join(sorted(extensions))}"
    try:
        captions_of(sample)
    except CorruptSampleError as error:
        return f"missing_caption: {str(error).removeprefix(f'{sample}: ')}"
    return None


def _table(samples: list[TarSample]) -> tuple[tuple[str, ...], np.ndarray]:
    fields = sorted({extension for sample in samples for extension in sample.entries})
    table = np.zeros((len(samples), len(fields), 3), dtype=np.uint32)
    table[:, :, 0] = ABSENT
    for place, sample in enumerate(samples):
        for extension, entry in sample.entries.items():
            table[place, fields.index(extension)] = entry
    return tuple(fields), table


def _long_keys(tar: Any, samples: list[TarSample]) -> dict[int, str]:
    """Keys that stand in a PAX or GNU header and cannot be read from the member's own."""
    long_keys = {}
    for place, sample in enumerate(samples):
        first_block = min(block for block, _, _ in sample.entries.values())
        tar.seek((first_block - 1) * BLOCK_BYTES)
        plain_key = split_member_name(plain_member_name(tar.read(BLOCK_BYTES)))[0]
        if plain_key != sample.key:
            long_keys[place] = sample.key
    return long_keys


# ------------------------------------------------------------------------------------- command


def print_plan(config: IndexShards) -> None:
    """Prints how many tars would be read.

    Raises:
        InputError: there are none, or the output was begun with another config.
    """
    check_output_folder(config.output, key="output")
    folder, names = find_tars(config.input)
    check_plan(config.output, _plan(config))
    todo = [task for task in _tasks(config, folder, names) if not _is_indexed(task)]
    num_bytes = sum(task.tar_path.stat().st_size for task in todo)
    print(  # noqa: T201
        f"would index {len(todo)} of {len(names)} tars in {folder}, {num_bytes / 1e6:,.1f} MB"
    )


def main() -> int:
    """The command."""
    return run_command(IndexShards, run=index_shards, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
