"""Consistency of dataset.json and manifest.jsonl with the shards and the plan of a dataset."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.folder import PLAN_FILE
from data_prep.shards.index import ShardIndex
from data_prep.shards.manifest import (
    DatasetInfo,
    IndexTotals,
    ManifestRow,
    fingerprint_of,
    inspect_info,
    parse_info,
)
from data_prep.verify.damaged_files import is_set_aside
from data_prep.verify.shard_check import Finding

PLAN_PATHS = (PLAN_FILE, f"plan/{PLAN_FILE}")  # written by index_shards and make_shards
MAX_EXTRA_NAMED = 10


@dataclass(frozen=True)
class DatasetOrigin:
    """The command that made a dataset, with its settings and input."""

    preparation: dict[str, Any]  # record in dataset.json, or else in the plan
    planned: dict[str, Any] | None  # record in the plan; None: there is no plan
    tar_folder: str | None  # None: dataset.json is unreadable

    @property
    def command(self) -> str | None:
        """The name of the command, such as make_shards; None if unknown."""
        return self.preparation.get("command")

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the command."""
        return self.preparation.get("config", {})

    @property
    def is_foreign(self) -> bool:
        """Whether the tars were not written by make_shards; repairs never rewrite such tars."""
        return self.command == "index_shards" or self.tar_folder not in (None, ".")


def read_origin(folder: Path) -> DatasetOrigin:
    """Reads the origin from dataset.json and the plan; unreadable files are skipped."""
    planned = None
    for path in PLAN_PATHS:
        try:
            found = json.loads((folder / path).read_bytes())["made_from"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        planned = found if isinstance(found, dict) else None
    try:
        path = folder / "dataset.json"
        info = parse_info(path.read_bytes(), path)
    except (OSError, InputError):
        return DatasetOrigin(planned or {}, planned=planned, tar_folder=None)
    preparation = info.preparation or planned or {}
    return DatasetOrigin(preparation, planned=planned, tar_folder=info.tar_folder)


def expects_parquet(folder: Path, origin: DatasetOrigin, names: Iterable[str]) -> bool:
    """Returns True if every shard of the dataset should have a Parquet file."""
    if origin.command in ("make_shards", "index_shards"):
        return origin.config.get("measure", origin.command == "make_shards")
    return any((folder / f"{name}.parquet").exists() for name in names)


def shard_names_on_disk(folder: Path, pattern: str) -> set[str]:
    """Finds the names of shards by a file pattern (*.tar, *.idx), including subfolders.

    Files that a repair keeps in `damaged/` are left out.
    """
    found = (
        path.relative_to(folder)
        for path in folder.rglob(pattern)
        if path.name[0] != "." and not is_set_aside(path, folder)
    )
    return {path.with_suffix("").as_posix() for path in found}


def sort_shards(names: Iterable[str]) -> list[str]:
    """Sorts names of shards in the order of a manifest."""
    return sorted(names, key=lambda name: Path(f"{name}.tar"))


def check_dataset(
    folder: Path, info: DatasetInfo, manifest: Sequence[ManifestRow], *, origin: DatasetOrigin
) -> list[Finding]:
    """Finds errors in dataset.json and manifest.jsonl, and shards that they do not list."""
    seal_problem = _seal_problem(folder)
    findings = list(
        _check_totals(folder, info, manifest, origin=origin, is_sealed=not seal_problem)
    )
    if seal_problem:
        text = f"{folder / 'dataset.json'}: edited or damaged: {seal_problem}"
        findings.append(Finding(text, "totals"))
    findings += _check_extra(folder, {row.name for row in manifest}, origin=origin)
    if not origin.is_foreign:
        findings += [
            Finding(f"{folder / copy}: has the same bytes as shard {first}", "extra shard")
            for copy, first in copies_among(manifest).items()
        ]
    return findings


def _seal_problem(folder: Path) -> str | None:
    path = folder / "dataset.json"
    return inspect_info(path.read_bytes(), path)[1]


def copies_among(manifest: Iterable[ManifestRow]) -> dict[str, str]:
    """Maps each shard that is a copy to the first shard with the same bytes."""
    first: dict[str, str] = {}
    copies: dict[str, str] = {}
    for row in manifest:
        if first.setdefault(row.tar_sha256, row.name) != row.name:
            copies[row.name] = first[row.tar_sha256]
    return copies


def _check_totals(
    folder: Path,
    info: DatasetInfo,
    manifest: Sequence[ManifestRow],
    *,
    origin: DatasetOrigin,
    is_sealed: bool,
) -> Iterator[Finding]:
    expected: dict[str, tuple[Any, str]] = {
        "num_shards": (len(manifest), "manifest.jsonl"),
        "num_samples": (sum(row.num_samples for row in manifest), "manifest.jsonl"),
        "tar_bytes": (sum(row.tar_bytes for row in manifest), "manifest.jsonl"),
        "fingerprint": (fingerprint_of(manifest), "manifest.jsonl"),
    }
    names = {row.name for row in manifest}
    totals = totals_of_indexes(
        folder,
        names | shard_names_on_disk(folder, "*.idx"),
        listed=names,
        modalities=info.named_modalities(),
    )
    for name, value in (totals or {}).items():
        expected[name] = value, "the indexes"
    if origin.config.get("media"):
        expected["media"] = origin.config["media"], "its preparation"
    if origin.planned is not None and is_sealed and origin.planned != info.preparation:
        text = f"{folder}: the plan ({PLAN_FILE}) differs from the preparation in dataset.json"
        yield Finding(text, "totals")
    elif origin.planned is not None:
        expected["preparation"] = origin.planned, PLAN_FILE
    for name, (value, where) in expected.items():
        if getattr(info, name) != value:
            text = f"expected {name} {value} ({where}), found {getattr(info, name)}"
            yield Finding(f"{folder / 'dataset.json'}: {text}", "totals")


def totals_of_indexes(
    folder: Path,
    names: Iterable[str],
    *,
    listed: set[str],
    modalities: Modalities | None = None,
) -> dict[str, Any] | None:
    """Computes the totals of dataset.json from the indexes; None if an index is unreadable.

    Args:
        names: names of all shards, including those without samples.
        listed: names of the shards that manifest.jsonl lists.
        modalities: modalities of the dataset; None or a pair dataset: they are not computed.
    """
    totals = IndexTotals(modalities)
    for name in sort_shards(names):
        try:
            index = ShardIndex.read(folder / f"{name}.idx")
        except InputError:
            return None
        if name in listed or not index.num_samples:
            totals.add(index)
    counted = totals.modalities()
    return {
        "fields": sorted(totals.fields),
        "rejected": dict(totals.rejected),
        "marked": dict(totals.marked),
        **({} if counted is None else {"modalities": counted.to_json()}),
    }


def _check_extra(folder: Path, listed: set[str], *, origin: DatasetOrigin) -> Iterator[Finding]:
    indexed = shard_names_on_disk(folder, "*.idx") - listed
    tars = set() if origin.is_foreign else shard_names_on_disk(folder, "*.tar") - listed
    extra = [name for name in sort_shards(indexed | tars) if not _is_empty_shard(folder, name)]
    for name in extra[:MAX_EXTRA_NAMED]:
        files = ".idx" if name in indexed else ".tar without an index"
        text = f"{folder / name}: manifest.jsonl does not list this shard ({files})"
        yield Finding(text, "extra shard")
    if len(extra) > MAX_EXTRA_NAMED:
        yield Finding(f"{folder}: {len(extra) - MAX_EXTRA_NAMED} more such shards", "extra shard")


def _is_empty_shard(folder: Path, name: str) -> bool:
    """Returns True if all samples of a shard were dropped; such shards are not in the manifest."""
    try:
        return not ShardIndex.read(folder / f"{name}.idx").num_samples
    except InputError:
        return False
