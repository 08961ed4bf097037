"""Makes a dataset of shards from pairs of media and caption.

    python -m data_prep.make_shards configs/data_prep/demo_scenes.yaml

1. scan     read_items: the rows of the manifest or folder, grouped into items
2. plan     shard k owns fixed items; plan.json says what the dataset is made from
3. write    each unfinished shard, in any order and by any number of processes
4. finish   rejected.jsonl, the check of their share, manifest.jsonl, and dataset.json last

Killed and run again, it keeps finished shards and ends with the same bytes.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.config import MakeShards
from data_prep.config_file import InputError, check_output_folder, fixed_values, run_command
from data_prep.dataset_folder import (
    begin_plan,
    check_plan,
    finish_dataset,
    is_finished,
    lock_folder,
    sum_rejected,
)
from data_prep.pair_shard import ShardTask, rejected_path, write_shard
from data_prep.pair_sources import Items, media_root_of, read_items
from data_prep.shard_format import ShardIndex, write_atomically
from data_prep.worker_pool import run_tasks

NUM_SIZES_SAMPLED = 500  # media files looked at by --dry-run


def make_shards(config: MakeShards) -> None:
    """Makes the dataset, or the part of it that is still missing.

    Raises:
        InputError: the input is unusable, the folder was begun from something else, too many
            pairs are bad, or no sample is left.
    """
    check_output_folder(config.output, key="output")
    items = read_items(config)
    shards = plan_shards(config, items)
    with lock_folder(config.output):
        begin_plan(config.output, _plan(config, items))
        todo = [shard for shard in shards if not _is_finished(shard)]
        if not todo and (config.output / "dataset.json").exists():
            print(f"{config.output}: already finished; nothing to do")  # noqa: T201
            return
        (config.output / "dataset.json").unlink(missing_ok=True)
        _write_shards(todo, kept=len(shards) - len(todo), config=config)
        _finish(shards, items, config=config)


def plan_shards(config: MakeShards, items: Items) -> list[ShardTask]:
    """The shards with the items each owns, whether or not these turn out good."""
    size = config.samples_per_shard
    return [
        ShardTask(
            folder=config.output,
            name=f"{number:08d}",
            media_kind=config.media,
            media_root=media_root_of(config),
            items=items.items[start : start + size],
        )
        for number, start in enumerate(range(0, len(items.items), size))
    ]


def _plan(config: MakeShards, items: Items) -> dict[str, Any]:
    return {
        "command": "make_shards",
        "config": fixed_values(config),
        "input": {"num_pairs": items.num_pairs, "sha256": items.sha256},
    }


def _is_finished(shard: ShardTask) -> bool:
    stem = shard.folder / shard.name
    if not is_finished(stem.with_suffix(".idx"), stem.with_suffix(".tar")):
        return False
    rejected = ShardIndex.read(stem.with_suffix(".idx")).rejected
    is_listed = not rejected or rejected_path(shard.folder, shard.name).exists()
    return is_listed and stem.with_suffix(".parquet").exists()


def _write_shards(shards: list[ShardTask], *, kept: int, config: MakeShards) -> None:
    if kept:
        print(f"{config.output}: keeping {kept} finished shards")  # noqa: T201
    total = sum(len(shard.items) for shard in shards)
    with tqdm(total=total, unit="item", desc="writing shards", disable=None) as bar:
        for num_items in run_tasks(write_shard, shards, workers=config.workers):
            bar.update(num_items)


# -------------------------------------------------------------------------------------- finish


def _finish(shards: list[ShardTask], items: Items, *, config: MakeShards) -> None:
    folder = config.output
    _join_rejected(folder, shards)
    indexes = [ShardIndex.read(folder / f"{shard.name}.idx") for shard in shards]
    rejected = sum_rejected(indexes)
    _check_rejected(rejected, items.num_pairs, config=config)
    if not any(index.num_samples for index in indexes):
        raise InputError(
            f"{config.input}: no usable pair among {items.num_pairs} ({_by_reason(rejected)}); "
            f"see {folder / 'rejected.jsonl'}"
        )
    info = finish_dataset(
        folder,
        [shard.name for shard in shards],
        media=config.media,
        preparation=_plan(config, items),
    )
    dropped = f"; {_by_reason(rejected)} rejected, see rejected.jsonl" if rejected else ""
    print(  # noqa: T201
        f"{folder}: {info.num_samples:,} samples with "
        f"{items.num_pairs - rejected.total():,} captions in {info.num_shards} shards, "
        f"{info.tar_bytes / 1e6:,.1f} MB{dropped}"
    )


def _join_rejected(folder: Path, shards: list[ShardTask]) -> None:
    parts = [rejected_path(folder, shard.name) for shard in shards]
    content = b"".join(path.read_bytes() for path in parts if path.exists())
    if content:
        write_atomically(folder / "rejected.jsonl", content)
    else:
        (folder / "rejected.jsonl").unlink(missing_ok=True)


def _check_rejected(rejected: Counter[str], num_pairs: int, *, config: MakeShards) -> None:
    fraction = rejected.total() / num_pairs
    if fraction <= config.max_rejected_fraction:
        return
    path = config.output / "rejected.jsonl"
    with path.open(encoding="utf-8") as file:
        first = json.loads(file.readline())
    example = f"row {first['row']} ({first['media'] or 'no path'}): {first['reason']}"
    example += f": {first['detail']}" if first["detail"] else ""
    raise InputError(
        f"{config.input}: {rejected.total():,} of {num_pairs:,} pairs are bad ({fraction:.1%}): "
        f"{_by_reason(rejected)}; at most max_rejected_fraction={config.max_rejected_fraction} is "
        f"accepted; first: {example}; all are listed in {path}; after raising the limit, run again "
        f"(finished shards are kept); after mending the pairs, delete {config.output} first; "
        f"relative paths start at {media_root_of(config)} (media_root)"
    )


def _by_reason(rejected: Counter[str]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in rejected.most_common())


# ------------------------------------------------------------------------------------- dry run


def print_plan(config: MakeShards) -> None:
    """Prints what would be made; writes nothing.

    Raises:
        InputError: as make_shards, as far as the scan can tell.
    """
    check_output_folder(config.output, key="output")
    items = read_items(config)
    shards = plan_shards(config, items)
    check_plan(config.output, _plan(config, items))
    rejected = Counter(p.reason for item in items.items for p in item.pairs if p.reason)
    sampled = items.items[:: max(1, len(items.items) // NUM_SIZES_SAMPLED)]
    paths = [media_root_of(config) / item.media for item in sampled if item.media]
    sizes = [path.stat().st_size for path in paths if path.is_file()]
    lines = [
        f"pairs: {items.num_pairs:,}",
        f"items: {len(items.items):,}",
        f"shards: {len(shards):,} of at most {config.samples_per_shard:,} samples",
        f"bad pairs found by the scan: {_by_reason(rejected) or 'none'}",
        f"media files missing: {len(paths) - len(sizes):,} of {len(paths):,} looked for",
    ]
    if rejected.total() > config.max_rejected_fraction * items.num_pairs:
        lines.append(f"the job would fail: max_rejected_fraction={config.max_rejected_fraction}")
    if sizes:
        estimate = sum(sizes) / len(sizes) * len(items.items)
        lines.append(f"media, estimated from {len(sizes):,} files: {estimate / 1e6:,.1f} MB")
    print("\n".join(lines))  # noqa: T201


def main() -> int:
    """The command."""
    return run_command(MakeShards, run=make_shards, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
