"""Makes a dataset of shards from pairs of media and caption.

    python -m data_prep.make_shards configs/data_prep/demo_scenes.yaml

1. plan     open_plan: the rows of the input, grouped into items; shard k owns fixed items
2. write    each unfinished shard, in any order and by any number of processes and jobs
3. finish   rejected.jsonl, the check of their share, manifest.jsonl, and dataset.json last

Killed and run again, it keeps finished shards and ends with the same bytes. With part=i/n it writes
every n-th shard and leaves finishing to python -m data_prep.finalize.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from data_prep.config import MakeShards

if __name__ == "__main__":  # --help and a wrong config end here, before the slow imports
    check_command_line(MakeShards, __doc__)

import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from data_prep.pipeline.dataset_finish import (
    by_reason,
    finish_shards,
    is_shard_finished,
    shards_of_plan,
)
from data_prep.pipeline.plan import (
    PLAN_FOLDER,
    ItemPlan,
    build_plan,
    describe_origin,
    open_plan,
    read_plan,
)
from data_prep.pipeline.shard import ShardTask, write_shard
from data_prep.shards.folder import check_plan, lock_folder, remove_leftovers
from data_prep.shards.index import ShardIndex
from data_prep.sources.formats import media_root_of
from data_prep.sources.input_files import check_output_apart
from data_prep.workers import run_tasks

NUM_SIZES_SAMPLED = 500  # media files looked at by --dry-run
# What another attempt may mend, with download.retry_failed=true.
TRANSIENT_REASONS = ("download_http_error", "download_timeout", "download_unreachable")


def make_shards(config: MakeShards) -> None:
    """Makes the dataset, or the part of it that is still missing.

    Raises:
        InputError: the input is unusable, the folder was begun from something else, too many
            pairs are bad, or no sample is left.
    """
    check_output_folder(config.output, key="output")
    check_output_apart(config)
    with lock_folder(config.output, part=config.part) as is_locked:
        plan = open_plan(config)
        shards = _shards_of_part(config, plan)
        if is_locked:
            remove_leftovers(config.output, stems={shard.name for shard in shards})
        todo = [shard for shard in shards if _is_to_make(shard)]
        if not todo and (config.output / "dataset.json").exists():
            say(f"{config.output}: already finished; nothing to do")
            return
        (config.output / "dataset.json").unlink(missing_ok=True)
        _write_shards(todo, kept=len(shards) - len(todo), config=config)
        if config.part is None:
            finish_shards(config, plan)
        else:
            say(
                f"{config.output}: the {len(shards):,} shards of part {config.part} are written; "
                "after the other parts, run python -m data_prep.finalize with the same config"
            )


def _shards_of_part(config: MakeShards, plan: ItemPlan) -> list[ShardTask]:
    number, total = map(int, (config.part or "0/1").split("/"))
    return shards_of_plan(config, plan)[number::total]


def _is_to_make(shard: ShardTask) -> bool:
    if not is_shard_finished(shard):
        return True
    config = shard.config
    remade = {*config.remake, *(TRANSIENT_REASONS if config.download.retry_failed else ())}
    rejected = ShardIndex.read(config.output / f"{shard.name}.idx").rejected if remade else {}
    return not remade.isdisjoint(rejected)


def _write_shards(shards: Sequence[ShardTask], *, kept: int, config: MakeShards) -> None:
    if kept:
        say(f"{config.output}: keeping {kept} finished shards")
    total = sum(shard.num_items for shard in shards)
    with tqdm(total=total, unit="item", desc="writing shards", disable=None) as bar:
        for num_items in run_tasks(write_shard, shards, workers=config.workers):
            bar.update(num_items)


# ------------------------------------------------------------------------------------- dry run


def print_plan(config: MakeShards) -> None:
    """Prints what would be made; writes nothing into the output folder.

    Raises:
        InputError: as make_shards, as far as the scan can tell.
    """
    check_output_folder(config.output, key="output")
    check_output_apart(config)
    made_from = describe_origin(config)
    check_plan(config.output, made_from, plan_folder=PLAN_FOLDER)
    with tempfile.TemporaryDirectory() as name:
        build_plan(config, Path(name) / PLAN_FOLDER, made_from=made_from)
        plan = read_plan(Path(name))
        sizes = _sampled_sizes(config, plan)
    found = [size for size in sizes if size is not None]
    lines = [
        f"pairs: {plan.num_pairs:,}",
        f"items: {plan.num_items:,}",
        f"shards: {plan.num_shards:,} of at most {config.samples_per_shard:,} samples",
        f"bad pairs found by the scan: {by_reason(plan.rejected) or 'none'}",
        f"media files missing: {len(sizes) - len(found):,} of {len(sizes):,} looked for",
    ]
    if sum(plan.rejected.values()) > config.max_rejected_fraction * plan.num_pairs:
        lines.append(f"the job would fail: max_rejected_fraction={config.max_rejected_fraction}")
    if found:
        estimate = sum(found) / len(found) * plan.num_items
        lines.append(f"media, estimated from {len(found):,} files: {estimate / 1e6:,.1f} MB")
    say("\n".join(lines))


def _sampled_sizes(config: MakeShards, plan: ItemPlan) -> list[int | None]:
    """Sizes of some media files given by local paths; None for one that is missing."""
    items = (item for shard in range(plan.num_shards) for item in plan.read_items(shard))
    step = max(1, plan.num_items // NUM_SIZES_SAMPLED)
    media = [
        item.media
        for item in islice(items, 0, None, step)
        if not item.place and any(pair.reason is None for pair in item.pairs)
    ]
    root = str(media_root_of(config))
    if "://" in root:
        return []
    paths = [Path(root) / name for name in media if "://" not in name]
    return [_size_of(path) for path in paths]


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:  # a name that is too long, or a folder that cannot be entered
        return None


def main() -> int:
    """The command."""
    return run_command(MakeShards, run=make_shards, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
