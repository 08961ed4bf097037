"""Published evaluation sets in clip_benchmark's WebDataset layout: tars and text files.

    classnames.txt                            one class per line
    zeroshot_classification_templates.txt     one prompt per line, {c} for the class
    dataset_type.txt                          classification | multilabel | retrieval
    test/0.tar 1.tar ...                      one folder per split
    test/nshards.txt                          number of tars

Any of the text files may be missing. The members of a sample are its media, `.cls` (class index),
`.npy` (one number per class), `.txt` (one caption per line) and `.json`. A folder of nothing but
tars also works, such as LAION's audio sets.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.errors import InputError
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    captions_of,
    media_kind_of,
    split_member_name,
)

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
TYPE = "dataset_type.txt"
NUM_TARS = "nshards.txt"


@dataclass(frozen=True)
class SetInfo:
    """Kind of media and member extensions of a set."""

    media: str  # kind of media
    fields: list[str]  # extensions of all members


@dataclass(frozen=True)
class TarSample:
    """Location of a sample's members within the tars."""

    tar: int  # index of the tar
    key: str
    members: dict[str, tuple[int, int]]  # extension -> (offset, size) in bytes


class TarDataset:
    """Samples of a folder of tars, in numerical order of the tars.

    Args:
        folder: folder of the tars, or of the text files and one folder of tars per split.
        split: split to read, if there is one folder per split.

    Raises:
        InputError: if tars are missing or damaged, or hold no media.
    """

    def __init__(self, folder: Path, *, split: str = "test") -> None:
        self.folder = folder
        self.tar_folder = folder if any(folder.glob("*.tar")) else folder / split
        self.tars = sorted(self.tar_folder.glob("*.tar"), key=_number_first)
        self._check_count()
        self.samples = [
            sample for number, tar in enumerate(self.tars) for sample in _samples_of(tar, number)
        ]
        self.info = self._read_info()

    def _check_count(self) -> None:
        path = self.tar_folder / NUM_TARS
        expected = path.read_text().strip() if path.exists() else str(len(self.tars))
        if not self.tars or str(len(self.tars)) != expected:
            raise InputError(
                f"{self.tar_folder}: expected {expected if self.tars else 'some'} tars, found "
                f"{len(self.tars)}; fetch what is missing"
            )

    def _read_info(self) -> SetInfo:
        if not self.samples:
            raise InputError(f"{self.tar_folder}: expected samples, found empty tars")
        fields = sorted({name for sample in self.samples for name in sample.members})
        media = {media_kind_of(extension) for extension in fields} - {None}
        if len(media) != 1:
            raise InputError(
                f"{self.tar_folder}: expected only images or only audio clips; found "
                f"members {fields}"
            )
        return SetInfo(media.pop(), fields)

    def __len__(self) -> int:
        return len(self.samples)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the SHA-256 digests of all tars, in order."""
        total = hashlib.sha256()
        for tar in self.tars:
            with tar.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        return total.hexdigest()

    def identities(self) -> list[tuple[int, ...]]:
        """Returns (device, inode of the tar, offset) of each sample."""
        files = [(stat.st_dev, stat.st_ino) for stat in (tar.stat() for tar in self.tars)]
        return [(*files[sample.tar], min(sample.members.values())[0]) for sample in self.samples]

    def read_sample(self, ordinal: int, *, fields: Sequence[str] | None = None) -> Sample:
        """Reads the members of a sample.

        Args:
            ordinal: index of the sample.
            fields: extensions of the members to read; None: all.

        Raises:
            CorruptSampleError: if the tar is truncated.
        """
        found = self.samples[ordinal]
        tar = self.tars[found.tar]
        wanted = {
            extension: location
            for extension, location in found.members.items()
            if fields is None or extension in fields
        }
        sample = Sample(str(tar), found.key, {})
        with tar.open("rb") as file:
            for extension, (start, num_bytes) in wanted.items():
                content = os.pread(file.fileno(), num_bytes, start)
                if len(content) != num_bytes:
                    raise CorruptSampleError(
                        f"{sample}: .{extension} is truncated; fetch the tar again"
                    )
                sample.members[extension] = content
        return sample

    def captions_of(self, sample: Sample) -> list[str]:
        """Returns the captions from `.json`, or else the lines of `.txt`.

        In `.txt` a line break within a caption is written as a backslash and an n.

        Raises:
            CorruptSampleError: if the sample has no caption.
        """
        if "json" in sample.members or "txt" not in sample.members:
            return captions_of(sample)
        try:
            lines = sample.members["txt"].decode("utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise CorruptSampleError(f"{sample}: .txt is not UTF-8: {error}") from None
        captions = [line.strip().replace("\\n", "\n") for line in lines if line.strip()]
        if not captions:
            raise CorruptSampleError(f"{sample}: .txt: expected a caption per line, found none")
        return captions

    def find_text_file(self, name: str) -> Path | None:
        """Finds a text file of the set, in its folder or in the parent folder."""
        candidates = (self.folder / name, self.folder.parent / name)
        return next((path for path in candidates if path.exists()), None)


def holds_tars(folder: Path, *, split: str) -> bool:
    """Returns whether a folder, or its subfolder for a split, contains tars."""
    return any(any(each.glob("*.tar")) for each in (folder, folder / split))


def _number_first(path: Path) -> tuple[int, str]:
    """Returns a sort key that puts 9.tar before 10.tar, and names without numbers last."""
    return (int(path.stem), "") if path.stem.isdecimal() else (1 << 62, path.name)


def _samples_of(path: Path, number: int) -> list[TarSample]:
    samples: dict[str, TarSample] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, extension = split_member_name(member.name)
                sample = samples.setdefault(key, TarSample(number, key, {}))
                if extension in sample.members:
                    raise InputError(f"{path}: sample {key}: duplicate member .{extension}")
                sample.members[extension] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise InputError(f"{path}: expected an uncompressed tar: {error}") from None
    return list(samples.values())
