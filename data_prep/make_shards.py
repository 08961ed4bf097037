"""Creates a dataset of shards from pairs of media and caption.

    python -m data_prep.make_shards configs/data_prep/demo_scenes.yaml

1. plan     groups the rows of the input into items; shard k owns a fixed range of items
2. write    writes each unfinished shard, in any order, with any number of processes and jobs
3. finish   writes rejected.jsonl, checks the fraction of bad pairs, writes manifest.jsonl, and
            dataset.json last

After an interruption, the same command keeps the finished shards, and the result has the same
bytes. With part=i/n, the command writes every n-th shard; after all parts are written,
python -m data_prep.finalize finishes the dataset.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from data_prep.config import MakeShards

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
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
    PlanSettings,
    build_plan,
    check_origin,
    describe_origin,
    open_plan,
    read_plan,
)
from data_prep.pipeline.shard import ShardSettings, ShardTask, write_shard
from data_prep.shards.folder import lock_folder, remove_leftovers
from data_prep.shards.index import ShardIndex
from data_prep.sources.input_files import check_output_outside_input, media_root_of
from data_prep.workers import run_tasks

NUM_SIZES_SAMPLED = 500  # media files that --dry-run measures
# Transient failures, which download.retry_failed=true retries.
TRANSIENT_REASONS = ("download_http_error", "download_timeout", "download_unreachable")


def make_shards(config: MakeShards) -> None:
    """Writes the dataset, or the unfinished shards of an existing one.

    Raises:
        InputError: if the input is unusable, or the folder was created with a different config or
            input. Also if too many pairs are bad, or no sample remains.
    """
    check_output_folder(config.output, key="output")
    check_output_outside_input(config.output, config.input)
    settings = ShardSettings.from_config(config)
    with lock_folder(config.output, part=config.part) as is_locked:
        plan = open_plan(
            config.output,
            PlanSettings.from_config(config),
            made_from=describe_origin(config),
        )
        shards = _shards_of_part(shards_of_plan(settings, plan), part=config.part)
        if is_locked:
            remove_leftovers(config.output, stems={shard.name for shard in shards})
        todo = [shard for shard in shards if _needs_writing(shard)]
        if not todo and (config.output / "dataset.json").exists():
            say(f"{config.output}: already finished; nothing to do")
            return
        (config.output / "dataset.json").unlink(missing_ok=True)
        if len(todo) < len(shards):
            say(f"{config.output}: keeping {len(shards) - len(todo)} finished shards")
        _write_shards(todo, workers=config.workers)
        if config.part is None:
            finish_shards(settings, plan, max_rejected_fraction=config.max_rejected_fraction)
        else:
            say(
                f"{config.output}: the {len(shards):,} shards of part {config.part} are written; "
                "after the other parts, run python -m data_prep.finalize with the same config"
            )


def _shards_of_part(shards: Sequence[ShardTask], *, part: str | None) -> Sequence[ShardTask]:
    number, total = map(int, (part or "0/1").split("/"))
    return shards[number::total]


def _needs_writing(shard: ShardTask) -> bool:
    if not is_shard_finished(shard):
        return True
    settings = shard.settings
    remade = {*settings.remake, *(TRANSIENT_REASONS if settings.download.retry_failed else ())}
    rejected = ShardIndex.read(settings.output / f"{shard.name}.idx").rejected if remade else {}
    return not remade.isdisjoint(rejected)


def _write_shards(shards: Sequence[ShardTask], *, workers: int) -> None:
    total = sum(shard.num_items for shard in shards)
    with tqdm(total=total, unit="item", desc="writing shards", disable=None) as bar:
        for num_items in run_tasks(write_shard, shards, workers=workers):
            bar.update(num_items)


# ------------------------------------------------------------------------------------- dry run


def print_plan(config: MakeShards) -> None:
    """Prints a summary of the dataset without writing into the output folder.

    Raises:
        InputError: if the scan of the input fails, as in `make_shards`.
    """
    check_output_folder(config.output, key="output")
    check_output_outside_input(config.output, config.input)
    made_from = describe_origin(config)
    check_origin(config.output, made_from)
    with tempfile.TemporaryDirectory() as name:
        settings = PlanSettings.from_config(config)
        build_plan(Path(name) / PLAN_FOLDER, settings, made_from=made_from)
        plan = read_plan(Path(name))
        sizes = _sampled_sizes(plan, media_root_of(settings.source))
    found = [size for size in sizes if size is not None]
    lines = [
        f"pairs: {plan.num_pairs:,}",
        f"items: {plan.num_items:,}",
        f"shards: {plan.num_shards:,} of at most {config.samples_per_shard:,} samples",
        f"bad pairs found by the scan: {by_reason(plan.rejected) or 'none'}",
        f"media files missing: {len(sizes) - len(found):,} of {len(sizes):,} checked",
    ]
    if sum(plan.rejected.values()) > config.max_rejected_fraction * plan.num_pairs:
        lines.append(f"the job would fail: max_rejected_fraction={config.max_rejected_fraction}")
    if found:
        estimate = sum(found) / len(found) * plan.num_items
        lines.append(f"media, estimated from {len(found):,} files: {estimate / 1e6:,.1f} MB")
    say("\n".join(lines))


def _sampled_sizes(plan: ItemPlan, root: str) -> list[int | None]:
    """Returns the sizes of a sample of local media files in bytes; None for a missing file."""
    items = (item for shard in range(plan.num_shards) for item in plan.read_items(shard))
    step = max(1, plan.num_items // NUM_SIZES_SAMPLED)
    media = [
        item.media
        for item in islice(items, 0, None, step)
        if not item.place and any(pair.reason is None for pair in item.pairs)
    ]
    if "://" in root:
        return []
    paths = [Path(root) / name for name in media if "://" not in name]
    return [_size_of(path) for path in paths]


def _size_of(path: Path) -> int | None:
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:  # a name that is too long, or a folder without access
        return None


def main() -> int:
    """Runs the command."""
    return run_command(MakeShards, run=make_shards, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
