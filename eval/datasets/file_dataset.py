"""Evaluation sets of media files, such as a folder with one folder per class.

folder/cat/1.jpg  folder/dog/1.jpg      the class is the folder's name
folder/test/cat/1.jpg                   the same, with a folder for each split

Tables of media files are read by eval.datasets.table.
"""

from __future__ import annotations

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
from eval.datasets.tar_dataset import SetInfo


@dataclass(frozen=True)
class MediaFile:
    """A sample: a media file and its metadata."""

    key: str
    path: str  # relative to the set's root
    metadata: dict[str, Any]


class FileDataset:
    """Evaluation set of media files below one folder.

    Args:
        root: folder that the files' paths are relative to.
        files: samples, in order.
        location: path of the set, shown in messages and reports.
        class_folders: folder names of the classes, in the order of the class indices.

    Raises:
        InputError: if there are no files, or images and audio clips are mixed.
    """

    def __init__(
        self,
        root: Path,
        files: Sequence[MediaFile],
        *,
        location: Path,
        class_folders: Sequence[str] = (),
    ) -> None:
        self.folder = location
        self.root = root
        self.files = files
        self.class_folders = list(class_folders)
        kinds = {media_kind_of(_extension(file.path)) for file in files}
        if len(kinds) != 1 or None in kinds:
            raise InputError(
                f"{location}: expected only images or only audio clips; found "
                f"{sorted({_extension(file.path) for file in files})[:10] or 'no files'}"
            )
        self.info = SetInfo(
            kinds.pop(), sorted({_extension(file.path) for file in files} | {"json"})
        )

    def __len__(self) -> int:
        return len(self.files)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the names, contents and metadata of all files, in order."""
        total = hashlib.sha256()
        for file in self.files:
            with self._path(file).open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
            total.update(json.dumps([file.key, file.path, file.metadata], sort_keys=True).encode())
        return total.hexdigest()

    def identities(self) -> list[tuple[int, int]]:
        """Returns (device, inode) of each sample's media file."""
        return [
            (stat.st_dev, stat.st_ino) for stat in (self._path(file).stat() for file in self.files)
        ]

    def read_sample(self, ordinal: int, *, fields: Sequence[str] | None = None) -> Sample:
        """Reads a sample's media file and its `.json`.

        Args:
            ordinal: index of the sample.
            fields: extensions of the members to read; None: all.

        Raises:
            OSError: if the file cannot be read.
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
    """Opens a folder, or its subfolder for a split, that holds one folder per class.

    Raises:
        InputError: if there are no media files.
    """
    root = folder / split if class_folders_in(folder / split) else folder
    names = class_folders_in(root)
    files = [
        MediaFile(*2 * [str(path.relative_to(root))], {"class_name": name})
        for name in names
        for path in sorted((root / name).rglob("*"))
        if media_kind_of(_extension(path.name)) is not None
    ]
    return FileDataset(root, files, location=folder, class_folders=names)


def class_folders_in(folder: Path) -> list[str]:
    """Lists the sorted names of the subfolders that contain media files."""
    if not folder.is_dir():
        return []
    return sorted(
        each.name
        for each in folder.iterdir()
        if each.is_dir() and any(media_kind_of(_extension(path.name)) for path in each.rglob("*.*"))
    )
