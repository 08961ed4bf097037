"""The files `dataset.json` (totals of a dataset) and `manifest.jsonl` (one row per shard).

Both are sealed (data_prep.storage.sealed). A row whose seal does not match is refused. Only a
warning is logged for dataset.json, because users edit its tar_folder; verify_shards reports it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data_prep.errors import InputError
from data_prep.modalities.modality import MEDIA_EXTENSIONS, Modalities, Modality
from data_prep.modalities.vectors import VectorSums
from data_prep.shards.index import REPAIR_ADVICE, ShardIndex
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

FORMAT_VERSION = 2  # with named modalities; pair datasets have PAIR_VERSION
PAIR_VERSION = 1
VERSION_2_KEYS = ("modalities", "labels")
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
    """The content of `dataset.json`.

    Version 1 is a pair dataset: an image or audio clip with captions in every sample. Version 2 has
    `modalities` and `labels` instead of `media`.
    """

    media: str  # "image" or "audio": of the first such modality; "" if there is none
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
    format_version: int = PAIR_VERSION
    modalities: dict[str, dict[str, Any]] = field(default_factory=dict)  # of version 2, in order
    labels: list[str] = field(default_factory=list)  # of version 2: names of the label columns

    def named_modalities(self) -> Modalities:
        """Returns the modalities in order.

        Raises:
            TypeError, ValueError, InputError: if `modalities` is invalid.
        """
        if self.format_version == PAIR_VERSION:
            return Modalities.pair(self.media, num_samples=self.num_samples)
        return Modalities.from_json(self.modalities)

    def to_values(self) -> dict[str, Any]:
        """Returns the object that dataset.json holds, without its seal."""
        omitted = VERSION_2_KEYS if self.format_version == PAIR_VERSION else ("media",)
        return {key: value for key, value in asdict(self).items() if key not in omitted}

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> DatasetInfo:
        """Builds the record from the object in a dataset.json, without its seal.

        Raises:
            TypeError, ValueError, KeyError, InputError: if the object is damaged.
        """
        if values["format_version"] == PAIR_VERSION:
            if values["media"] not in MEDIA_EXTENSIONS or set(VERSION_2_KEYS) & set(values):
                raise ValueError(f"media {values['media']!r}")
            return _checked_types(cls(**values))
        if "media" in values:
            raise ValueError(f"media {values['media']!r} in format version {FORMAT_VERSION}")
        modalities = Modalities.from_json(values["modalities"])
        media = next((modalities[name].kind for name in modalities.media), "")
        return _checked_types(cls(media=media, **values))


class IndexTotals:
    """The totals of the indexes of a dataset, added in the order of the shards.

    Args:
        modalities: modalities of the dataset; None or a pair dataset: they are not counted.
    """

    def __init__(self, modalities: Modalities | None):
        self.fields: set[str] = set()
        self.rejected: Counter[str] = Counter()
        self.marked: Counter[str] = Counter()
        self._modalities = None if modalities is None or modalities.is_pair else modalities
        self._num_samples: Counter[str] = Counter()
        self._sums: dict[str, VectorSums] = {}

    def add(self, index: ShardIndex) -> None:
        """Adds the next shard."""
        self.fields.update(index.fields)
        self.rejected.update(index.rejected)
        self.marked.update(index.marked)
        for bit, name in enumerate(index.modalities or ()):
            self._num_samples[name] += index.num_having(bit)
        for name, sums in index.vector_sums.items():
            self._sums.setdefault(name, VectorSums.empty(len(sums.mean))).merge(sums)

    def modalities(self) -> Modalities | None:
        """Returns the modalities with their counts and statistics; None for a pair dataset."""
        if self._modalities is None:
            return None
        return Modalities(
            {name: self._counted(name, modality) for name, modality in self._modalities.items()}
        )

    def _counted(self, name: str, modality: Modality) -> Modality:
        counted = replace(modality, num_samples=self._num_samples[name])
        if name not in self._sums:
            return counted
        sums = self._sums[name]
        return replace(
            counted,
            num_rows=sums.num_rows,
            mean=tuple(sums.mean.tolist()),
            std=tuple(sums.std.tolist()),
        )


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
    write_atomically(folder / "dataset.json", to_sealed_json(info.to_values(), indent=2))


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
        if version in (PAIR_VERSION, FORMAT_VERSION):
            return DatasetInfo.from_values(values), _seal_problem(content)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: damaged ({error}); {REPAIR_ADVICE}") from None
    raise InputError(
        f"{path}: expected format version {PAIR_VERSION} or {FORMAT_VERSION}, found {version}"
    )


def _seal_problem(content: bytes) -> str | None:
    try:
        known = [each.name for each in fields(DatasetInfo) if each.name not in VERSION_2_KEYS]
        read_sealed_json(content, unsealed_keys=known)
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
