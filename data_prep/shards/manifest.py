"""The files `dataset.json` (totals of a dataset) and `manifest.jsonl` (one row per shard).

Both are sealed (data_prep.storage.sealed). A row whose seal does not match is refused. Only a
warning is logged for dataset.json, because users edit its tar_folder; verify_shards reports it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_prep.errors import InputError
from data_prep.shards.index import REPAIR_ADVICE, ShardIndex
from data_prep.shards.sample import MEDIA_EXTENSIONS
from data_prep.storage.atomic import sha256_of, write_atomically
from data_prep.storage.sealed import (
    ROW_SEAL_KEY,
    SEAL,
    DamagedFileError,
    read_sealed_json,
    read_sealed_row,
    to_sealed_json,
    to_sealed_row,
    warn_once,
)

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
Record = TypeVar("Record", bound="ManifestRow | DatasetInfo")


@dataclass(frozen=True)
class ManifestRow:
    """A line of `manifest.jsonl`, which describes one shard."""

    name: str  # stem of the shard's files
    num_samples: int
    tar_bytes: int
    tar_sha256: str
    index_bytes: int
    index_sha256: str
    # Parquet file; None: there is none, or an earlier version wrote the manifest.
    parquet_bytes: int | None = None
    parquet_sha256: str | None = None


@dataclass(frozen=True)
class DatasetInfo:
    """The content of `dataset.json`."""

    media: str  # "image" or "audio"
    fields: list[str]
    num_samples: int
    num_shards: int
    tar_bytes: int
    fingerprint: str  # fingerprint of the manifest; equal data has equal fingerprints
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> number of dropped pairs
    # filter -> number of samples flagged but kept
    marked: dict[str, int] = field(default_factory=dict)
    # command and config that created the dataset
    preparation: dict[str, Any] = field(default_factory=dict)
    num_pairs: int | None = None  # pairs in the input, including dropped ones; None: unknown
    isopair_version: str = ""
    tar_folder: str = "."  # relative to this folder
    format_version: int = FORMAT_VERSION


def fingerprint_of(rows: Sequence[ManifestRow]) -> str:
    """Returns the SHA-256 over the content of the shards in order, independent of their names."""
    canonical = [[row.num_samples, row.tar_sha256, row.index_sha256] for row in rows]
    return hashlib.sha256(json.dumps(canonical).encode()).hexdigest()


def manifest_row(folder: Path, name: str) -> ManifestRow:
    """Builds the manifest row of a finished shard from its index and Parquet file.

    Raises:
        InputError: if the index is missing or damaged.
    """
    path = folder / f"{name}.idx"
    index, content = ShardIndex.read(path), path.read_bytes()
    parquet = folder / f"{name}.parquet"
    has_parquet = parquet.is_file()
    return ManifestRow(
        name=name,
        num_samples=index.num_samples,
        tar_bytes=index.tar_bytes,
        tar_sha256=index.tar_sha256,
        index_bytes=len(content),
        index_sha256=hashlib.sha256(content).hexdigest(),
        parquet_bytes=parquet.stat().st_size if has_parquet else None,
        parquet_sha256=sha256_of(parquet) if has_parquet else None,
    )


def write_dataset_files(
    folder: Path, info: DatasetInfo, *, manifest: Sequence[ManifestRow]
) -> None:
    """Writes `manifest.jsonl`, then `dataset.json`, which marks the dataset as complete."""
    lines = "".join(to_sealed_row(asdict(row)) for row in manifest)
    write_atomically(folder / "manifest.jsonl", lines.encode())
    write_atomically(folder / "dataset.json", to_sealed_json(asdict(info), indent=2))


def read_dataset_files(folder: Path) -> tuple[DatasetInfo, list[ManifestRow]]:
    """Reads dataset.json and manifest.jsonl without comparing them.

    Raises:
        InputError: if a file is missing or damaged, or has a different format version.
    """
    try:
        info_text = (folder / "dataset.json").read_bytes()
        manifest_text = (folder / "manifest.jsonl").read_bytes()
    except OSError as error:
        raise InputError(
            f"{error.filename}: expected a dataset of shards: {error.strerror}; create one with "
            "python -m data_prep.make_shards, or index existing tars with "
            "python -m data_prep.index_shards; if only this file is lost, "
            f"{REPAIR_ADVICE}"
        ) from None
    return (
        parse_info(info_text, folder / "dataset.json"),
        parse_manifest(manifest_text, folder / "manifest.jsonl"),
    )


def parse_info(content: bytes, path: Path | str) -> DatasetInfo:
    """Parses the content of a dataset.json; a seal that does not match is logged.

    Raises:
        InputError: if it is damaged, or has a different format version.
    """
    info, problem = inspect_info(content, path)
    if problem is not None:
        warn_once(log, f"{path}: edited or damaged: {problem}; {REPAIR_ADVICE}")
    return info


def inspect_info(content: bytes, path: Path | str) -> tuple[DatasetInfo, str | None]:
    """Parses the content of a dataset.json.

    Returns:
        (content, reason why the seal does not match; None if it does, or if there is none)

    Raises:
        InputError: if it is damaged, or has a different format version.
    """
    try:
        values = json.loads(content)
        version = values.get("format_version")
        values.pop(SEAL, None)
        if version == FORMAT_VERSION and values["media"] in MEDIA_EXTENSIONS:
            info = _checked_types(DatasetInfo(**values))
            return info, _seal_problem(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); {REPAIR_ADVICE}") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: expected format version {FORMAT_VERSION}, found {version}")
    raise InputError(f"{path}: damaged (media {values['media']!r}); {REPAIR_ADVICE}")


def _seal_problem(content: bytes) -> str | None:
    try:
        read_sealed_json(content, unsealed_keys=[each.name for each in fields(DatasetInfo)])
    except DamagedFileError as error:
        return str(error)
    return None


def parse_manifest(content: bytes, path: Path | str) -> list[ManifestRow]:
    """Parses the content of a manifest.jsonl.

    Raises:
        InputError: if a line or its seal is damaged, or the name of a shard points outside the
            folder.
    """
    rows = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            values = json.loads(line)
            values.pop(ROW_SEAL_KEY, None)
            row = _checked_types(ManifestRow(**values))
            if row.name.startswith("/") or ".." in row.name.split("/"):
                raise ValueError(f"name {row.name!r} points outside the folder")
            read_sealed_row(line)
        except (TypeError, ValueError, AttributeError) as error:
            reason = f"line {number}: damaged ({error})"
            raise InputError(f"{path}: {reason}; {REPAIR_ADVICE}") from None
        rows.append(row)
    return rows


def _checked_types(record: Record) -> Record:
    """Returns the record; raises ValueError if a value does not have its declared type."""
    try:
        _types_of(type(record)).validate_json(json.dumps(asdict(record)), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"{key} {first['input']!r}: {first['msg']}") from None
    return record


@cache
def _types_of(record_class: type) -> TypeAdapter:
    return TypeAdapter(record_class)


def _check_fingerprint(folder: Path, info: DatasetInfo, manifest: list[ManifestRow]) -> None:
    if fingerprint_of(manifest) != info.fingerprint:
        raise InputError(
            f"{folder}: fingerprint mismatch between manifest.jsonl and dataset.json; "
            "check the dataset with python -m data_prep.verify_shards"
        )
