"""Plan of a repair: which file on disk is which, by the checksums that the manifest records.

A tar, index or Parquet file may stand in the place of another, or under another name. Its checksum
says where it belongs; for the Parquet files of earlier versions, which have none in the manifest,
their rows do. The plan is computed without changing anything:

1. rows of the manifest whose name is damaged take the name of the shard that they describe
2. misplaced files move to their places
3. files that stand in these places, and are recorded nowhere, move to `damaged/`
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_prep.shards.manifest import ManifestRow
from data_prep.storage.atomic import sha256_of, temporary_name
from data_prep.verify.damaged_files import (
    is_set_aside,
    link_or_copy,
    remove_if_empty,
    set_aside,
)
from data_prep.verify.repair_task import read_index
from data_prep.verify.unsealed_parquet import parquet_sums
from data_prep.workers import run_tasks

SUFFIXES = (".tar", ".idx", ".parquet")


@dataclass(frozen=True)
class Move:
    """A file with the content of a recorded file, which stands elsewhere."""

    source: Path
    target: Path


@dataclass(frozen=True)
class RepairPlan:
    """The changes before any file is rebuilt."""

    rows: dict[str, ManifestRow]  # name of the shard -> row
    renamed_rows: dict[str, str] = field(default_factory=dict)  # damaged name -> name of the shard
    moves: list[Move] = field(default_factory=list)
    displaced: list[Path] = field(default_factory=list)  # files that make room for moved ones


def make_plan(
    folder: Path,
    rows: Mapping[str, ManifestRow],
    *,
    unsealed: Collection[str],
    is_foreign: bool,
    workers: int,
) -> RepairPlan:
    """Plans which files to move.

    Args:
        folder: dataset folder.
        rows: name of the shard -> row of the manifest.
        unsealed: names of rows of an earlier version, without a checksum: they may be damaged.
        is_foreign: whether the tars were not written by make_shards; they are then never moved.
        workers: number of processes that compute checksums.
    """
    suffixes = SUFFIXES[1:] if is_foreign else SUFFIXES
    sums = _sums_on_disk(folder, rows, suffixes=suffixes, workers=workers)
    doubtful = {name: rows[name] for name in unsealed}
    renamed = {} if is_foreign else _damaged_names(folder, doubtful, sums, listed=rows)
    rows = {
        renamed.get(name, name): replace(row, name=renamed.get(name, name))
        for name, row in rows.items()
    }
    expected = _expected_sums(folder, rows.values(), suffixes=suffixes)
    if not is_foreign:
        expected = _places_of_unlisted_indexes(folder, sums, recorded=expected) | expected
    expected |= parquet_sums(rows.values(), sums, folder=folder, workers=workers)
    moves = _moves(expected, sums)
    sources = {move.source for move in moves}
    displaced = [
        move.target for move in moves if move.target in sums and move.target not in sources
    ]
    return RepairPlan(dict(rows), renamed, moves, displaced)


def apply_plan(plan: RepairPlan, *, folder: Path) -> None:
    """Moves the files.

    Each file is linked into `damaged/` until all are in their places. An interrupted call loses
    nothing, because a plan also finds files there.
    """
    for path in plan.displaced:
        set_aside(path, folder=folder)
    kept = {}
    for move in plan.moves:
        is_there = is_set_aside(move.source, folder)
        kept[move] = move.source if is_there else set_aside(move.source, folder=folder)
    for move, path in kept.items():
        passing = move.target.with_name(temporary_name(move.target.name))
        passing.unlink(missing_ok=True)
        passing.parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(path, passing)
        passing.replace(move.target)
    targets = {move.target for move in plan.moves}
    for move, path in kept.items():
        if move.source not in targets:
            move.source.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
    remove_if_empty(folder)


def _sums_on_disk(
    folder: Path, rows: Mapping[str, ManifestRow], *, suffixes: tuple[str, ...], workers: int
) -> dict[Path, str | None]:
    """Returns the sha256 of the files of shards, also of those in `damaged/`.

    It is None for a file of a listed shard whose size the manifest never records. If the manifest
    lists not all shards, or not their Parquet files, its sizes are not complete and play no role.
    """
    sizes = {
        size
        for row in rows.values()
        for size in (row.tar_bytes, row.index_bytes, row.parquet_bytes)
    }
    is_unsealed = any(row.parquet_sha256 is None for row in rows.values())
    paths = [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix in suffixes and path.name[0] != "." and path.is_file()
        if path.relative_to(folder).parts[0] != "plan"
    ]
    unlisted = {path for path in paths if _shard_name(path, folder) not in rows}
    lists_all = all(is_set_aside(path, folder) for path in unlisted)
    hashed = [
        path
        for path in paths
        if path.stat().st_size in sizes
        or path in unlisted
        or not lists_all
        or (is_unsealed and path.suffix == ".parquet")
    ]
    sums = dict(run_tasks(_named_sum, hashed, workers=workers))
    return {path: sums.get(path) for path in paths}


def _named_sum(path: Path) -> tuple[Path, str]:
    return path, sha256_of(path)


def _shard_name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix("").as_posix()


def _places_of_unlisted_indexes(
    folder: Path, sums: Mapping[Path, str | None], *, recorded: Mapping[Path, str]
) -> dict[Path, str]:
    """Returns the places of indexes next to the tars that they record, for lost manifests.

    If the manifest records another tar in that place, the tar belongs next to its index.
    """
    tars = {
        sha256: path
        for path, sha256 in sums.items()
        if path.suffix == ".tar" and sha256 is not None and not is_set_aside(path, folder)
    }
    known, places = set(recorded.values()), {}
    for path, sha256 in sums.items():
        is_unlisted = sha256 is not None and sha256 not in known
        if path.suffix == ".idx" and is_unlisted and not is_set_aside(path, folder):
            index = read_index(path)
            is_in_place = index and sums.get(path.with_suffix(".tar")) == index.tar_sha256
            if not index or is_in_place or index.tar_sha256 not in tars:
                continue
            tar = tars[index.tar_sha256]
            if tar in recorded:
                places[path.with_suffix(".tar")] = index.tar_sha256
            else:
                places[tar.with_suffix(".idx")] = sha256
    return places


def _expected_sums(
    folder: Path, rows: Iterable[ManifestRow], *, suffixes: tuple[str, ...]
) -> dict[Path, str]:
    expected = {}
    for row in rows:
        recorded = zip(
            SUFFIXES, (row.tar_sha256, row.index_sha256, row.parquet_sha256), strict=True
        )
        expected |= {
            folder / f"{row.name}{suffix}": sha256
            for suffix, sha256 in recorded
            if sha256 is not None and suffix in suffixes
        }
    return expected


def _damaged_names(
    folder: Path,
    rows: Mapping[str, ManifestRow],
    sums: Mapping[Path, str | None],
    *,
    listed: Collection[str],
) -> dict[str, str]:
    """Maps the names of rows without any file to the unlisted shard whose tar they describe."""
    unlisted = {
        sha256: _shard_name(path, folder)
        for path, sha256 in sums.items()
        if path.suffix == ".tar" and sha256 is not None
        if not is_set_aside(path, folder)
        if _shard_name(path, folder) not in listed
    }
    has_files = {_shard_name(path, folder) for path in sums}
    return {
        name: unlisted[row.tar_sha256]
        for name, row in rows.items()
        if name not in has_files and row.tar_sha256 in unlisted
    }


def _moves(expected: Mapping[Path, str], sums: Mapping[Path, str | None]) -> list[Move]:
    available = {
        (path.suffix, sha256): path
        for path, sha256 in reversed(sums.items())
        if sha256 is not None and expected.get(path) != sha256
    }
    missing = [(path, sha256) for path, sha256 in expected.items() if sums.get(path) != sha256]
    return [
        Move(available.pop((path.suffix, sha256)), path)
        for path, sha256 in missing
        if (path.suffix, sha256) in available
    ]
