"""The plan of an unfinished dataset: the assignment of input rows to shards.

1. scan    writes the pairs of the input, with cleaned captions, to one Parquet file in input order
2. group   joins the pairs of one media file to one item, in order of first appearance
3. plan    writes the items to plan/items-00000.parquet, ..., with one row group per shard

The stages stream through files, so that the input may be larger than memory. The folder `plan/` is
renamed into place when it is complete. Several jobs may build it at the same time: their plans are
equal, and the job that finishes first publishes its plan.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.config import CaptionOptions, DownloadOptions, MakeShards
from data_prep.config_file import default_values, fixed_values
from data_prep.errors import (
    InputError,
    RunError,
)
from data_prep.modalities.modality import Modalities
from data_prep.pipeline.grouping import group_pairs, items_of_table, table_of_pairs
from data_prep.pipeline.media_reader import MediaReader
from data_prep.pipeline.sample_parts import find_shapes
from data_prep.pipeline.scan import scan_pairs
from data_prep.shards.columns import KeptType
from data_prep.shards.folder import PLAN_FILE, check_plan
from data_prep.sources.formats import input_state
from data_prep.sources.input_files import PairSource
from data_prep.sources.pair import Item
from data_prep.storage.atomic import (
    name_file,
    temporary_name,
    write_atomically,
)

PLAN_FOLDER = "plan"
SHARDS_PER_FILE = 256


@dataclass(frozen=True)
class PlanSettings:
    """The settings for building a plan, named as in `MakeShards`."""

    source: PairSource
    captions: CaptionOptions
    captions_per_item: str
    mark_only: tuple[str, ...]
    samples_per_shard: int
    workers: int
    download: DownloadOptions
    max_media_bytes: int

    @classmethod
    def from_config(cls, config: MakeShards) -> PlanSettings:
        """Copies the fields from a config."""
        return cls(
            source=PairSource.from_config(config),
            captions=config.captions,
            captions_per_item=config.captions_per_item,
            mark_only=config.mark_only,
            samples_per_shard=config.samples_per_shard,
            workers=config.workers,
            download=config.download,
            max_media_bytes=config.max_media_bytes,
        )


@dataclass(frozen=True)
class ItemPlan:
    """A finished plan.

    Args:
        folder: the folder `plan/`.
        made_from: command, settings and state of the input, as recorded in dataset.json.
        num_pairs: number of captions in the input, including unusable ones.
        num_items: number of samples before bad samples are dropped.
        num_shards: number of shards. Shard k owns the items
            [k * samples_per_shard, (k + 1) * samples_per_shard).
        rejected: number of pairs that the scan rejected, by reason.
        kept: type of each column kept for the user.
        labels: type of each label; of samples of modalities.
        modalities: modalities with the shapes of vectors, as Modalities.to_json returns them; empty
            for pairs.
    """

    folder: Path
    made_from: dict[str, Any]
    num_pairs: int
    num_items: int
    num_shards: int
    rejected: dict[str, int]
    kept: dict[str, KeptType]
    labels: dict[str, KeptType] = field(default_factory=dict)
    modalities: dict[str, dict[str, Any]] = field(default_factory=dict)

    def named_modalities(self) -> Modalities | None:
        """Returns the modalities of the samples; None for pairs."""
        return Modalities.from_json(self.modalities) if self.modalities else None

    def read_items(self, shard: int) -> list[Item]:
        """Reads the items of one shard, in order."""
        import pyarrow.parquet

        number, row_group = divmod(shard, SHARDS_PER_FILE)
        with pyarrow.parquet.ParquetFile(_items_path(self.folder, number)) as file:
            return items_of_table(file.read_row_group(row_group))


def _items_path(folder: Path, number: int) -> Path:
    return folder / f"items-{number:05d}.parquet"


def open_plan(output: Path, settings: PlanSettings, *, made_from: dict[str, Any]) -> ItemPlan:
    """Returns the plan in the output folder; builds it if there is none.

    Args:
        output: the dataset folder.
        settings: settings for building the plan.
        made_from: result of `describe_origin`.

    Raises:
        InputError: if the input is unusable or contains no pair, or the folder was created with a
            different config or input.
    """
    folder = output / PLAN_FOLDER
    check_origin(output, made_from)
    if not folder.exists():
        temporary = output / temporary_name(PLAN_FOLDER)
        try:
            build_plan(temporary, settings, made_from=made_from)
            _publish(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        check_origin(output, made_from)
    return read_plan(output)


def check_origin(output: Path, made_from: dict[str, Any]) -> None:
    """Checks that a dataset folder is new, or was created from the same config and input.

    Args:
        output: dataset folder.
        made_from: result of `describe_origin`.

    Raises:
        InputError: if settings or input differ, or the folder contains other files.
    """
    defaults = json.loads(json.dumps({"config": default_values(MakeShards)}))
    check_plan(output, made_from, plan_folder=PLAN_FOLDER, defaults=defaults)


def describe_origin(config: MakeShards) -> dict[str, Any]:
    """Describes the origin of a dataset; equal in all attempts that may share an output folder."""
    return {
        "command": "make_shards",
        "config": fixed_values(config),
        "input": input_state(PairSource.from_config(config)),
    }


def _publish(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not (folder / PLAN_FILE).exists():  # otherwise another job published it first
            raise


def read_plan(output: Path) -> ItemPlan:
    """Reads the plan of a dataset folder in which `make_shards` was started.

    Raises:
        InputError: if there is no plan, or it is damaged.
    """
    folder = output / PLAN_FOLDER
    try:
        values = json.loads((folder / PLAN_FILE).read_text(encoding="utf-8"))
        return ItemPlan(folder=folder, made_from=values["made_from"], **values["items"])
    except FileNotFoundError:
        raise InputError(
            f"{output}: expected a dataset with a plan, found no {PLAN_FOLDER}/{PLAN_FILE}; "
            "start it with python -m data_prep.make_shards"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{folder / PLAN_FILE}: damaged ({error}); delete {folder} to rebuild it"
        ) from None


def build_plan(folder: Path, settings: PlanSettings, *, made_from: dict[str, Any]) -> None:
    """Reads the whole input and writes its plan into a new folder.

    Raises:
        InputError: if the input is unusable or contains no pair.
        OSError: if the folder cannot be written (full disk); the message includes the folder.
    """
    import duckdb

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        _write_plan(folder, settings, made_from=made_from)
    except duckdb.IOException as error:
        raise RunError(f"{folder}: cannot sort the pairs in this folder: {error}") from None
    except OSError as error:
        raise name_file(error, folder) from None


def _write_plan(folder: Path, settings: PlanSettings, *, made_from: dict[str, Any]) -> None:
    rows_path, source, mark_only = folder / "rows.parquet", settings.source, settings.mark_only
    scan = scan_pairs(
        source,
        rows_path,
        captions=settings.captions,
        mark_only=mark_only,
        workers=settings.workers,
    )
    if not scan.num_pairs:
        raise InputError(f"{source.input}: expected pairs of media and caption, found none")
    items = group_pairs(
        rows_path,
        scratch=folder / "spill",
        captions_per_item="row" if source.media is None else settings.captions_per_item,
        max_repeats=settings.captions.max_repeats,
        drops_repeated="caption_repeated" not in mark_only,
    )
    rejected: Counter[str] = Counter()
    with _ItemWriter(folder, items_per_shard=settings.samples_per_shard) as writer:
        for item in items:
            rejected.update(pair.reason for pair in item.pairs if pair.reason)
            writer.add(item)
    rows_path.unlink()
    shutil.rmtree(folder / "spill", ignore_errors=True)
    summary = {
        "num_pairs": scan.num_pairs,
        "num_items": writer.num_items,
        "num_shards": writer.num_shards,
        "rejected": dict(sorted(rejected.items())),
        "kept": scan.kept,
    }
    modalities = source.columns.modalities()
    if modalities is not None:
        plan = ItemPlan(folder, made_from, **summary)
        shapes = _find_shapes(plan, modalities, settings)
        summary |= {"labels": scan.labels, "modalities": shapes.to_json()}
    content = json.dumps({"made_from": made_from, "items": summary}, indent=2) + "\n"
    write_atomically(folder / PLAN_FILE, content.encode())


def _find_shapes(plan: ItemPlan, modalities: Modalities, settings: PlanSettings) -> Modalities:
    downloads = plan.folder / "probe"
    reader = MediaReader(
        settings.source,
        downloads=downloads,
        download=settings.download,
        max_bytes=settings.max_media_bytes,
    )
    items = (item for shard in range(plan.num_shards) for item in plan.read_items(shard))
    with reader:
        found = find_shapes(items, modalities, reader)
    shutil.rmtree(downloads, ignore_errors=True)
    return found


class _ItemWriter:
    """Writes items in order: one row group per shard, `SHARDS_PER_FILE` row groups per file."""

    def __init__(self, folder: Path, *, items_per_shard: int):
        self.folder = folder
        self.items_per_shard = items_per_shard
        self.num_items = self.num_shards = 0
        self._waiting: list[Item] = []
        self._file: Any = None

    def __enter__(self) -> _ItemWriter:
        return self

    def add(self, item: Item) -> None:
        self._waiting.append(item)
        self.num_items += 1
        if len(self._waiting) == self.items_per_shard:
            self._write(self._waiting)

    def _write(self, items: Sequence[Item]) -> None:
        import pyarrow.parquet

        pairs = [pair for item in items for pair in item.pairs]
        numbers = [item.number for item in items for _ in item.pairs]
        table = table_of_pairs(pairs, item=numbers)
        if self.num_shards % SHARDS_PER_FILE == 0:
            self._close_file()
            path = _items_path(self.folder, self.num_shards // SHARDS_PER_FILE)
            self._file = pyarrow.parquet.ParquetWriter(path, table.schema, compression="zstd")
        self._file.write_table(table, row_group_size=len(pairs))
        self.num_shards += 1
        self._waiting = []

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()

    def __exit__(self, error_type: type | None, *_: Any) -> None:
        if error_type is None and self._waiting:
            self._write(self._waiting)
        self._close_file()
