"""`dataset.json` and `manifest.jsonl`: totals of a dataset and one row per shard."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_prep.errors import InputError
from data_prep.shards.index import REPAIR_ADVICE, ShardIndex
from data_prep.shards.sample import MEDIA_EXTENSIONS
from data_prep.storage.atomic import write_atomically

FORMAT_VERSION = 1
Record = TypeVar("Record", bound="ManifestRow | DatasetInfo")


@dataclass(frozen=True)
class ManifestRow:
    """One shard as `manifest.jsonl` records it."""

    name: str  # stem of the shard's files
    num_samples: int
    tar_bytes: int
    tar_sha256: str
    index_bytes: int
    index_sha256: str


@dataclass(frozen=True)
class DatasetInfo:
    """What `dataset.json` holds."""

    media: str  # "image" or "audio"
    fields: list[str]
    num_samples: int
    num_shards: int
    tar_bytes: int
    fingerprint: str  # of the manifest's rows: equal data has equal fingerprints
    rejected: dict[str, int] = field(default_factory=dict)  # pairs dropped, by reason
    marked: dict[str, int] = field(default_factory=dict)  # samples that a filter only marked
    preparation: dict[str, Any] = field(default_factory=dict)  # config that made the dataset
    num_pairs: int | None = None  # pairs in the input, with those dropped; None: not recorded
    isopair_version: str = ""
    tar_folder: str = "."  # where the tars are, from this folder
    format_version: int = FORMAT_VERSION


def fingerprint_of(rows: Sequence[ManifestRow]) -> str:
    """sha256 over what the shards hold, in order: names and places do not count."""
    canonical = [[row.num_samples, row.tar_sha256, row.index_sha256] for row in rows]
    return hashlib.sha256(json.dumps(canonical).encode()).hexdigest()


def manifest_row(folder: Path, name: str) -> ManifestRow:
    """The manifest row of a finished shard, from its index.

    Raises:
        InputError: the index is missing or damaged.
    """
    path = folder / f"{name}.idx"
    index, content = ShardIndex.read(path), path.read_bytes()
    return ManifestRow(
        name=name,
        num_samples=index.num_samples,
        tar_bytes=index.tar_bytes,
        tar_sha256=index.tar_sha256,
        index_bytes=len(content),
        index_sha256=hashlib.sha256(content).hexdigest(),
    )


def write_dataset_files(
    folder: Path, info: DatasetInfo, *, manifest: Sequence[ManifestRow]
) -> None:
    """Writes `manifest.jsonl` and then `dataset.json`, whose presence says the dataset is whole."""
    lines = "".join(json.dumps(asdict(row)) + "\n" for row in manifest)
    write_atomically(folder / "manifest.jsonl", lines.encode())
    write_atomically(folder / "dataset.json", json.dumps(asdict(info), indent=2).encode() + b"\n")


def read_dataset_files(folder: Path) -> tuple[DatasetInfo, list[ManifestRow]]:
    """What dataset.json and manifest.jsonl hold, whether or not they agree.

    Raises:
        InputError: one of them is missing, is damaged, or is of another version.
    """
    try:
        info_text = (folder / "dataset.json").read_bytes()
        manifest_text = (folder / "manifest.jsonl").read_bytes()
    except OSError as error:
        raise InputError(
            f"{error.filename}: expected a dataset of shards: {error.strerror}; make one with "
            "python -m data_prep.make_shards, or index tars that you have with "
            "python -m data_prep.index_shards; if only this file is lost, "
            f"{REPAIR_ADVICE}"
        ) from None
    return (
        parse_info(info_text, folder / "dataset.json"),
        parse_manifest(manifest_text, folder / "manifest.jsonl"),
    )


def parse_info(content: bytes, path: Path | str) -> DatasetInfo:
    """What a dataset.json holds.

    Raises:
        InputError: it is damaged, or is of another version.
    """
    try:
        values = json.loads(content)
        version = values.get("format_version")
        if version == FORMAT_VERSION and values["media"] in MEDIA_EXTENSIONS:
            return _checked_types(DatasetInfo(**values))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); {REPAIR_ADVICE}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: expected format version {FORMAT_VERSION}, found {version}")
    raise InputError(f"{path}: damaged (media {values['media']!r}); {REPAIR_ADVICE}")


def parse_manifest(content: bytes, path: Path | str) -> list[ManifestRow]:
    """What a manifest.jsonl holds.

    Raises:
        InputError: a line is damaged, or its name leads out of the folder.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = _checked_types(ManifestRow(**json.loads(line)))
            if row.name.startswith("/") or ".." in row.name.split("/"):
                raise ValueError(f"name {row.name!r} leads out of the folder")
        except (TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{path}: line {number}: damaged ({error}); {REPAIR_ADVICE}") from None
        rows.append(row)
    return rows


def _checked_types(record: Record) -> Record:
    """The record, whose values all are of the types of its class; a ValueError if not."""
    try:
        _types_of(type(record)).validate_json(json.dumps(asdict(record)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place} {first['input']!r}: {first['msg']}") from None
    return record


@cache
def _types_of(record_class: type) -> TypeAdapter:
    return TypeAdapter(record_class)


def _check_fingerprint(folder: Path, info: DatasetInfo, manifest: list[ManifestRow]) -> None:
    if fingerprint_of(manifest) != info.fingerprint:
        raise InputError(
            f"{folder}: manifest.jsonl has not the fingerprint that dataset.json records; "
            "check the dataset with python -m data_prep.verify_shards"
        )
