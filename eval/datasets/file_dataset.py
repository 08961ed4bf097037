"""Evaluation sets of files: one folder per class, or a table of files and what is said of them.

folder/cat/1.jpg  folder/dog/1.jpg      the class is the folder's name; or of a split in between:
folder/test/cat/1.jpg                   ImageNet's folders, for one, are classes by their order

table.csv, .tsv or .jsonl               a row per file, or several of one file, with captions or
                                        classes in columns (see eval.datasets.columns); all
                                        columns can be referred to as a sample's .json
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.shards.sample import (
    Sample,
    media_kind_of,
)
from eval.datasets.columns import TableColumns
from eval.datasets.tar_dataset import SetInfo

TABLE_SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": None}
CSV_FIELD_BYTES = 1 << 24


@dataclass(frozen=True)
class MediaFile:
    """A sample: a file, and what is said of it."""

    key: str
    path: str  # below the set's folder
    metadata: dict[str, Any]


class FileDataset:
    """Files below a folder.

    Args:
        folder: of the keys.
        files: in the set's order.
        place: of the set, for messages and reports.
        class_folders: names of the folders that stand for classes, in their order.

    Raises:
        InputError: there are none, or of several kinds of media, or one is missing.
    """

    def __init__(
        self,
        folder: Path,
        files: Sequence[MediaFile],
        *,
        place: Path,
        class_folders: Sequence[str] = (),
    ) -> None:
        self.folder = place
        self.root = folder
        self.files = files
        self.class_folders = list(class_folders)
        kinds = {media_kind_of(_extension(file.path)) for file in files}
        if len(kinds) != 1 or None in kinds:
            raise InputError(
                f"{place}: expected pictures, or sounds, and no others; found "
                f"{sorted({_extension(file.path) for file in files})[:10] or 'no files'}"
            )
        self.info = SetInfo(
            kinds.pop(), sorted({_extension(file.path) for file in files} | {"json"})
        )

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the names, contents and metadata of all files, in their order."""
        total = hashlib.sha256()
        for file in self.files:
            with self._path(file).open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
            total.update(json.dumps([file.key, file.path, file.metadata], sort_keys=True).encode())
        return total.hexdigest()

    def read_sample(self, ordinal: int, *, fields: Sequence[str] | None = None) -> Sample:
        """The members of a sample: its file, and .json; with `fields`, those of these extensions.

        Raises:
            OSError: the file cannot be read.
        """
        file = self.files[ordinal]
        sample = Sample(str(self.folder), file.key, {})
        extension = _extension(file.path)
        if fields is None or extension in fields:
            sample.members[extension] = self._path(file).read_bytes()
        if fields is None or "json" in fields:
            sample.members["json"] = json.dumps(file.metadata).encode()
        return sample

    def _path(self, file: MediaFile) -> Path:
        return self.root / file.path


def _extension(key: str) -> str:
    return Path(key).suffix[1:].lower()


def read_class_folders(folder: Path, *, split: str) -> FileDataset:
    """The media below the folders of classes in a folder, or in its folder of a split.

    Raises:
        InputError: there are none.
    """
    root = folder / split if class_folders_in(folder / split) else folder
    names = class_folders_in(root)
    files = [
        MediaFile(*2 * [str(path.relative_to(root))], {"class_name": name})
        for name in names
        for path in sorted((root / name).rglob("*"))
        if media_kind_of(_extension(path.name)) is not None
    ]
    return FileDataset(root, files, place=folder, class_folders=names)


def class_folders_in(folder: Path) -> list[str]:
    """The names, sorted, of the folders with media in a folder; none if it is no such folder."""
    if not folder.is_dir():
        return []
    return sorted(
        each.name
        for each in folder.iterdir()
        if each.is_dir() and any(media_kind_of(_extension(path.name)) for path in each.rglob("*.*"))
    )


def read_table(path: Path, columns: TableColumns) -> FileDataset:
    """The files that a table names, in the order of their first rows.

    Raises:
        InputError: the table is not readable or lacks a column, or a file is missing.
    """
    files: dict[str, MediaFile] = {}
    for number, row in enumerate(_rows_of(path), start=1):
        try:
            media = columns.media.format(**row)
            key = media if columns.key is None else columns.key.format(**row)
        except (KeyError, IndexError, ValueError) as error:
            raise InputError(
                f"{path}: row {number}: columns.media is {columns.media!r}, columns.key "
                f"{columns.key!r}; found the columns {sorted(row)} ({error})"
            ) from None
        known = files.setdefault(key, MediaFile(key, media, row | {"captions": []})).metadata
        known["captions"] += [row[name] for name in columns.captions if row.get(name)]
        if columns.class_name in row:
            known["class_name"] = row[columns.class_name]
        if columns.class_names in row:
            known["class_names"] = _several(row[columns.class_names], columns.class_separator)
    missing = [file.path for file in files.values() if not (path.parent / file.path).is_file()]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(files)} files are missing, the first: "
            f"{path.parent / missing[0]}; fetch them, or take their rows out"
        )
    return FileDataset(path.parent, list(files.values()), place=path)


def _several(cell: str | list[str], separator: str) -> list[str]:
    if isinstance(cell, list):
        return cell
    return [name.strip() for name in cell.split(separator) if name.strip()]


def _rows_of(path: Path) -> list[dict[str, Any]]:
    delimiter = TABLE_SUFFIXES[path.suffix]
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            if delimiter is None:
                return [json.loads(line) for line in lines if line.strip()]
            csv.field_size_limit(CSV_FIELD_BYTES)
            quoting = csv.QUOTE_NONE if path.suffix == ".tsv" else csv.QUOTE_MINIMAL
            return list(csv.DictReader(lines, delimiter=delimiter, quoting=quoting, strict=True))
    except (OSError, UnicodeDecodeError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: expected a table of media: {error}") from None
