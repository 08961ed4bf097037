"""Completion of a dataset after all shards are written: rejected pairs, manifest, dataset.json."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.command import say
from data_prep.errors import InputError
from data_prep.pipeline.plan import ItemPlan
from data_prep.pipeline.shard import (
    DOWNLOAD_FOLDER,
    ShardSettings,
    ShardTask,
    rejected_path,
)
from data_prep.shards.folder import finish_dataset, index_if_finished
from data_prep.shards.index import ShardIndex
from data_prep.sources.input_files import media_root_of
from data_prep.sources.pair import CLIP_PREFIX
from data_prep.storage.atomic import temporary_name

NUM_SHARDS_NAMED = 10


def shards_of_plan(settings: ShardSettings, plan: ItemPlan) -> list[ShardTask]:
    """Lists all shards of the dataset, including those of other parts."""
    # The format was detected by the scan; otherwise each shard would list a large folder again.
    source = dataclasses.replace(settings.source, format=plan.made_from["input"]["format"])
    settings = dataclasses.replace(settings, source=source)
    return [ShardTask(number, settings, plan) for number in range(plan.num_shards)]


def is_shard_finished(shard: ShardTask) -> bool:
    """Returns True if all files of a shard exist and its index matches its tar."""
    return _index_if_finished(shard) is not None


def _index_if_finished(shard: ShardTask) -> ShardIndex | None:
    folder, name = shard.settings.output, shard.name
    index = index_if_finished(folder / f"{name}.idx", folder / f"{name}.tar")
    if index is None or not (folder / f"{name}.parquet").exists():
        return None
    is_listed = not _num_pairs(index.rejected) or rejected_path(folder, name).exists()
    return index if is_listed else None


def _num_pairs(rejected: dict[str, int]) -> int:
    return sum(count for reason, count in rejected.items() if not reason.startswith(CLIP_PREFIX))


def finish_shards(settings: ShardSettings, plan: ItemPlan, *, max_rejected_fraction: float) -> None:
    """Writes rejected.jsonl, manifest.jsonl and dataset.json, and prints a summary.

    Args:
        settings: settings of the shards.
        plan: plan of the dataset.
        max_rejected_fraction: maximum accepted fraction of bad pairs.

    Raises:
        InputError: if a shard is missing, too many pairs are bad, or no sample remains.
    """
    output, source = settings.output, settings.source
    shards = shards_of_plan(settings, plan)
    rejected = _count_rejected(shards, output)
    _join_rejected(output, shards)
    num_bad = _num_pairs(rejected)
    if num_bad / plan.num_pairs > max_rejected_fraction:
        raise _too_many_rejected(rejected, plan, settings=settings, limit=max_rejected_fraction)
    if num_bad == plan.num_pairs:
        raise InputError(
            f"{source.input}: no usable pair among {plan.num_pairs} ({by_reason(rejected)}); "
            f"see {output / 'rejected.jsonl'}"
        )
    names = [shard.name for shard in shards]
    info = finish_dataset(
        output,
        names,
        media=source.media or "",
        modalities=plan.named_modalities(),
        labels=list(plan.labels),
        preparation=plan.made_from,
        num_pairs=plan.num_pairs,
    )
    if not settings.download.keep:
        shutil.rmtree(output / DOWNLOAD_FOLDER, ignore_errors=True)
    notes = f"; {by_reason(rejected)} rejected, see rejected.jsonl" if rejected else ""
    notes += f"; marked: {by_reason(info.marked)}" if info.marked else ""
    having = f"{plan.num_pairs - num_bad:,} captions"
    if info.modalities:
        named = info.named_modalities().items()
        having = ", ".join(f"{modality.num_samples or 0:,} {name}" for name, modality in named)
    say(
        f"{output}: {info.num_samples:,} samples with {having} in {info.num_shards} shards, "
        f"{info.tar_bytes / 1e6:,.1f} MB{notes}"
    )


def _count_rejected(shards: Sequence[ShardTask], output: Path) -> Counter[str]:
    rejected: Counter[str] = Counter()
    missing = []
    for shard in shards:
        index = _index_if_finished(shard)
        if index is None:
            missing.append(shard.name)
        else:
            rejected.update(index.rejected)
    if missing:
        named = ", ".join(missing[:NUM_SHARDS_NAMED])
        more = f" and {len(missing) - NUM_SHARDS_NAMED} more" * (len(missing) > NUM_SHARDS_NAMED)
        raise InputError(
            f"{output}: expected {len(shards)} finished shards, found {len(missing)} unfinished: "
            f"{named}{more}; run python -m data_prep.make_shards with the same settings: "
            "without part=, or again for each part i/n (shard k belongs to part k mod n)"
        )
    return rejected


def _join_rejected(folder: Path, shards: Sequence[ShardTask]) -> None:
    path = folder / "rejected.jsonl"
    parts = [rejected_path(folder, shard.name) for shard in shards]
    parts = [part for part in parts if part.exists()]
    if not parts:
        path.unlink(missing_ok=True)
        return
    temporary = folder / temporary_name(path.name)
    with temporary.open("wb") as joined:
        for part in parts:
            with part.open("rb") as file:
                shutil.copyfileobj(file, joined)
    temporary.replace(path)


def _too_many_rejected(
    rejected: Counter[str], plan: ItemPlan, *, settings: ShardSettings, limit: float
) -> InputError:
    num_bad = _num_pairs(rejected)
    path = settings.output / "rejected.jsonl"
    with path.open(encoding="utf-8") as file:
        first = json.loads(file.readline())
    example = f"row {first['row']} ({first['media'] or 'no path'}): {first['reason']}"
    example += f": {first['detail']}" if first["detail"] else ""
    return InputError(
        f"{settings.source.input}: {num_bad:,} of {plan.num_pairs:,} pairs are bad "
        f"({num_bad / plan.num_pairs:.1%}): {by_reason(rejected)}; at most "
        f"max_rejected_fraction={limit} is accepted; first: {example}; {path} lists all of them; "
        "after raising the limit, run again (finished shards are kept); after repairing media, run "
        "again with remake=[reason, ...]; relative paths are relative to "
        f"{media_root_of(settings.source)} (media_root)"
    )


def by_reason(counts: dict[str, int]) -> str:
    """Formats counts as text, largest first."""
    return ", ".join(f"{count:,} {reason}" for reason, count in Counter(counts).most_common())
