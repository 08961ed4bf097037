"""Writes indexes, manifest and dataset.json for existing tars, without changing the tars.

    python -m data_prep.index_shards configs/data_prep/index.yaml input=/data/tars output=/data/x

Reads uncompressed tars from WebDataset's ShardWriter, img2dataset or plain `tar`. Refuses tars
with:

- truncation, damage, links, or names that point outside the folder
- samples whose members are not adjacent
- samples without media or caption, or with fewer than `min_modalities` of the configured
  modalities, or with undecodable media, unless skip_incomplete is set

With `measure`, a Parquet file is also written for each tar.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from data_prep.config import IndexShards

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(IndexShards, __doc__)

import glob
import os
import sys
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.config_file import fixed_values
from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities, Modality
from data_prep.shards.columns import (
    KeptType,
    KeptTypes,
    check_kept_names,
)
from data_prep.shards.folder import (
    begin_plan,
    check_plan,
    finish_dataset,
    index_if_finished,
    lock_folder,
)
from data_prep.shards.index import ShardIndex
from data_prep.shards.tar_index import IndexTask, index_tar, kept_types_of_tar, shapes_in_tar
from data_prep.workers import run_tasks

NUM_PROBLEMS_SHOWN = 20


def index_shards(config: IndexShards) -> None:
    """Writes the sidecars of all tars.

    Raises:
        InputError: if there are no tars, or tars have problems; the message lists shards and keys.
    """
    check_output_folder(config.output, key="output")
    folder, names = find_tars(config.input)
    modalities = _modalities(config, [folder / f"{name}.tar" for name in names])
    check_kept_names([*config.labels, *config.keep_columns], modalities=modalities)
    with lock_folder(config.output):
        begin_plan(config.output, _plan(config))
        kept = _kept_types(config, folder, names)
        tasks = _tasks(config, folder, names, modalities=modalities, kept=kept)
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
            media=config.media or "",
            modalities=modalities,
            labels=config.labels,
            preparation=_plan(config),
            tar_folder=os.path.relpath(folder, config.output),
        )
    left_out = f"; skipped: {info.rejected}" if info.rejected else ""
    say(
        f"{config.output}: {info.num_samples:,} samples in {info.num_shards} shards, "
        f"{info.tar_bytes / 1e6:,.1f} MB, indexed{left_out}"
    )


def _refuse_empty(config: IndexShards, tasks: list[IndexTask]) -> None:
    left_out: Counter[str] = Counter()
    for task in tasks:
        index = ShardIndex.read(task.index_path)
        if index.num_samples:
            return
        left_out.update(index.rejected)
    expected, key = f"{config.media} and a caption", f"media={config.media}"
    if config.modalities:
        expected = f"{config.min_modalities} of {', '.join(config.modalities)}"
        key = "modalities"
    raise InputError(
        f"{config.input}: no sample with {expected}; skipped: {dict(left_out)}; check {key}"
    )


def _modalities(config: IndexShards, tar_paths: Sequence[Path]) -> Modalities:
    """Returns the modalities with the shapes of vectors: those of the first usable members.

    Raises:
        InputError: if a modality of kind vector has no usable member in any tar.
    """
    if config.media is not None:
        return Modalities.pair(config.media)
    modalities = Modalities({name: Modality(kind) for name, kind in config.modalities.items()})
    wanted, shapes = modalities.names_of("vector"), {}
    for path in tar_paths:
        if len(shapes) == len(wanted):
            break
        shapes = shapes_in_tar(path, modalities) | shapes
    for name in wanted:
        if name not in shapes:
            members = " or ".join(f".{each}" for each in modalities.extensions_of(name))
            raise InputError(
                f"{config.input}: modalities.{name}: no tar has a usable member {members}; remove "
                "this modality, or check its name"
            )
    return modalities.with_shapes(shapes)


def find_tars(pattern: str) -> tuple[Path, list[str]]:
    """Finds the tars of an input.

    Returns:
        Folder that contains all tars, and their sorted paths relative to it, without .tar.

    Raises:
        InputError: if nothing was found, or a file without the extension .tar.
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


def _kept_types(config: IndexShards, folder: Path, names: list[str]) -> dict[str, KeptType]:
    """Returns column types that fit the values in all tars, so that all files have one schema."""
    names_kept = (*config.labels, *config.keep_columns)
    if not names_kept:
        return {}
    paths = [folder / f"{name}.tar" for name in names]
    types = KeptTypes(names_kept)
    read_types = partial(kept_types_of_tar, names=names_kept)
    for found in run_tasks(read_types, paths, workers=config.workers):
        types.merge(found)
    return types.types(found_in=config.input)


def _tasks(
    config: IndexShards,
    folder: Path,
    names: list[str],
    *,
    modalities: Modalities,
    kept: dict[str, KeptType] | None = None,
) -> list[IndexTask]:
    return [
        IndexTask(
            tar_path=folder / f"{name}.tar",
            index_path=config.output / f"{name}.idx",
            name=name,
            modalities=modalities,
            min_modalities=config.min_modalities,
            skip_incomplete=config.skip_incomplete,
            measure=config.measure,
            kept=kept or {},
        )
        for name in names
    ]


def _plan(config: IndexShards) -> dict[str, Any]:
    return {"command": "index_shards", "config": fixed_values(config)}


def _is_indexed(task: IndexTask) -> bool:
    if index_if_finished(task.index_path, task.tar_path) is None:
        return False
    if task.measure and not task.parquet_path.exists():
        return False
    return task.index_path.stat().st_mtime_ns >= task.tar_path.stat().st_mtime_ns


def _problem_list(config: IndexShards, problems: list[str]) -> str:
    shown = "\n".join(f"  {problem}" for problem in problems[:NUM_PROBLEMS_SHOWN])
    more = len(problems) - NUM_PROBLEMS_SHOWN
    advice = (
        "rebuild these tars (tar --sort=name keeps the members of a sample adjacent); samples "
        "that are merely incomplete, or whose media cannot be decoded, can be skipped with "
        "skip_incomplete=true"
    )
    return (
        f"{config.input}: problems found: {len(problems)}\n{shown}\n"
        + (f"  and {more} more\n" if more > 0 else "")
        + advice
    )


# ------------------------------------------------------------------------------------- command


def print_plan(config: IndexShards) -> None:
    """Prints the number of tars to be read.

    Raises:
        InputError: if there are no tars, or the output was created with a different config.
    """
    check_output_folder(config.output, key="output")
    folder, names = find_tars(config.input)
    check_plan(config.output, _plan(config))
    modalities = _modalities(config, [folder / f"{name}.tar" for name in names])
    tasks = _tasks(config, folder, names, modalities=modalities)
    todo = [task for task in tasks if not _is_indexed(task)]
    num_bytes = sum(task.tar_path.stat().st_size for task in todo)
    say(f"would index {len(todo)} of {len(names)} tars in {folder}, {num_bytes / 1e6:,.1f} MB")


def main() -> int:
    """Runs the command."""
    return run_command(IndexShards, run=index_shards, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
