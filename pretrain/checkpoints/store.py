"""Where checkpoints are kept: a folder, or a URL that fsspec can write to (s3://, gs://, ...).

What is being written counts only when it is committed. In a folder it is written beside, under the
attempt's own name, and renamed. Object stores cannot rename, but put a file whole or not at all:
there every attempt writes into a folder of its own, and its RECORD, written last, makes it count.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

from data_prep.config_file import read_yaml
from data_prep.storage.file_transfer import WrongContentError, with_tries
from data_prep.storage.remote_file import (
    exists,
    file_system,
    is_url,
    join,
    list_files,
    local_path,
    open_binary,
    read_bytes,
)

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

RECORD = "checkpoint.json"
RETRIES = 5  # of what fails behind a URL and may pass
FOLDER_NAME = re.compile(r"step_(\d{8,})(?:_attempt_(\w+))?")
LEFTOVER_NAME = re.compile(r"\.step_\d+\.(\w+)(?:\.former)?\.tmp")


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete, or a file has another sum than recorded."""


@dataclass(frozen=True)
class StoredFile:
    """What is recorded of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, order=True)
class StoredCheckpoint:
    """A folder that may hold a whole checkpoint."""

    step: int
    attempt: str  # that wrote it; empty where names do not tell
    location: str  # path or URL


def open_store(folder: str | Path) -> CheckpointStore:
    """The store in a folder, or behind a URL."""
    local = local_path(str(folder))
    return ObjectStore(str(folder)) if local is None else CheckpointStore(str(local))


def find_locations(folder: str) -> list[str]:
    """Of what may be checkpoints, the newest first: the folder itself, or those of the run in it.

    Args:
        folder: path or URL.
    """
    if exists(join(folder, RECORD)):
        return [folder]
    return [each.location for each in store_of_run(folder).checkpoints()]


def store_of_run(folder: str) -> CheckpointStore:
    """Where a run keeps its checkpoints, by its folder."""
    config = Path(folder) / "config.yaml"
    elsewhere = None
    if not is_url(folder) and config.exists():
        elsewhere = read_yaml(config).get("run", {}).get("checkpoint_folder")
    return open_store(elsewhere or join(folder, "checkpoints"))


class CheckpointStore:
    """Checkpoints in a folder of a file system that renames at once, also on a network.

    Args:
        folder: made when the first checkpoint is begun.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def checkpoints(self) -> list[StoredCheckpoint]:
        """All that may be whole, the newest first."""
        found = []
        for name in self._names():
            if match := FOLDER_NAME.fullmatch(name):
                step, attempt = match.groups()
                found.append(StoredCheckpoint(int(step), attempt or "", join(self.folder, name)))
        return sorted(found, reverse=True)

    def _names(self) -> list[str]:
        folder = Path(self.folder)
        return [path.name for path in folder.iterdir()] if folder.exists() else []

    def partial(self, step: int, attempt: str) -> str:
        """Where an attempt's files of a step go until they are committed."""
        return join(self.folder, f".step_{step:08d}.{attempt}.tmp")

    def begin(self, partial: str) -> None:
        """To be called by every rank before it writes there.

        Raises:
            OSError: the folder cannot be made.
        """
        Path(partial).mkdir(parents=True, exist_ok=True)

    def commit(self, partial: str, step: int) -> None:
        """Makes a written checkpoint count, at once and for good.

        Raises:
            OSError: it cannot be renamed.
        """
        for folder in [Path(partial), *(p for p in Path(partial).rglob("*") if p.is_dir())]:
            _flush_folder(folder)
        final = Path(self.folder) / f"step_{step:08d}"
        former = Path(partial).with_name(Path(partial).name.replace(".tmp", ".former.tmp"))
        if final.exists():  # a damaged one that the run went back behind
            final.replace(former)
        Path(partial).replace(final)
        _flush_folder(Path(self.folder))
        shutil.rmtree(former, ignore_errors=True)

    def delete(self, location: str) -> None:
        """Deletes a checkpoint, which counts no more from the first moment on."""
        (Path(location) / RECORD).unlink(missing_ok=True)
        shutil.rmtree(location)

    def abandon(self, partial: str) -> None:
        """Deletes what was begun and will not be committed, as far as that is possible."""
        shutil.rmtree(partial, ignore_errors=True)

    def delete_leftovers(self, attempt: str) -> None:
        """Deletes what attempts before this one began and never committed."""
        for name in self._names():
            match = LEFTOVER_NAME.fullmatch(name)
            if match and match.group(1) < attempt:
                self.abandon(join(self.folder, name))


class ObjectStore(CheckpointStore):
    """Checkpoints behind a URL.

    Args:
        folder: the URL.
    """

    def _names(self) -> list[str]:
        files, inner = file_system(self.folder)
        files.invalidate_cache()
        try:
            listed = tried(self.folder, lambda: files.ls(inner, detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in listed]

    def partial(self, step: int, attempt: str) -> str:
        return join(self.folder, f"step_{step:08d}_attempt_{attempt}")

    def begin(self, partial: str) -> None:
        pass  # folders are part of names here

    def commit(self, partial: str, step: int) -> None:
        pass  # the record is there

    def delete(self, location: str) -> None:
        files, inner = file_system(location)

        def delete() -> None:
            if files.exists(f"{inner}/{RECORD}"):
                files.rm_file(f"{inner}/{RECORD}")
            if files.exists(inner):
                files.rm(inner, recursive=True)

        tried(location, delete)

    def abandon(self, partial: str) -> None:
        try:
            self.delete(partial)
        except OSError as error:
            logger.warning("%s could not be deleted: %s", partial, error)

    def delete_leftovers(self, attempt: str) -> None:
        for each in self.checkpoints():
            if each.attempt < attempt:
                names = {file.name for file in list_files(each.location)}
                if RECORD not in names:
                    self.abandon(each.location)


# ---------------------------------------------------------------------------------------- files


def tried(path: str, action: Callable[[], Result]) -> Result:
    """What `action` returns; behind a URL it is tried again while what fails may pass.

    Raises:
        OSError: it has failed.
    """
    if local_path(path) is not None:
        return action()
    return with_tries(path, action, retries=RETRIES)


def write_file(
    location: str, name: str, chunks: Callable[[], Iterable[bytes | memoryview]]
) -> StoredFile:
    """Writes a file through to the disk and reads it again.

    Args:
        location: of the checkpoint, or where it is until it is committed.
        name: of the file in it, with / between its parts.
        chunks: gives its content.

    Raises:
        OSError: it cannot be written, or another content is read than was written.
    """
    path = join(location, name)
    return tried(path, lambda: _write(path, chunks()))


def _write(path: str, chunks: Iterable[bytes | memoryview]) -> StoredFile:
    written = hashlib.sha256()
    num_bytes = 0
    with _opened_for_writing(path) as file:
        for chunk in chunks:
            file.write(chunk)
            written.update(chunk)
            num_bytes += len(chunk)
    found = sum_of(path)
    if found != written.hexdigest():
        raise WrongContentError(
            f"{path}: sha256 of what was written is {written.hexdigest()}, of what is read {found}"
        )
    return StoredFile(num_bytes, found)


@contextmanager
def _opened_for_writing(path: str) -> Iterator[BinaryIO]:
    if is_url(path):
        files, inner = file_system(path)
        with files.open(inner, "wb") as file:
            yield file
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb") as file:  # noqa: PTH123
            yield file
            file.flush()
            os.fsync(file.fileno())
            # So that it is the disk that is read afterwards, not what memory keeps of it.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None  # a full disk names no file


def sum_of(path: str) -> str:
    """The sha256 of a file, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """

    def read() -> str:
        with open_binary(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return tried(path, read)


def verify_file(location: str, name: str, recorded: StoredFile) -> None:
    """
    Raises:
        DamagedCheckpointError: the file is missing, or differs from what was recorded.
        OSError: the network or the server have failed.
    """
    path = join(location, name)
    try:
        found = sum_of(path)
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        if not is_missing and local_path(path) is None:
            raise
        raise DamagedCheckpointError(f"{path}: {error.strerror or error}") from None
    if found != recorded.sha256:
        raise DamagedCheckpointError(f"{path}: sha256 is {found}, not {recorded.sha256}")


def read_file(location: str, name: str) -> bytes:
    """A small file of a checkpoint.

    Raises:
        OSError: it cannot be read.
    """
    path = join(location, name)
    return tried(path, lambda: read_bytes(path))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
