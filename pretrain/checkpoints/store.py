"""Checkpoint storage: a folder, or a URL that fsspec can write to (s3://, gs://, ...).

A checkpoint exists once it is committed. In a folder, an attempt writes under its own temporary
name and renames it. Object stores cannot rename, but they write each file atomically. There, every
attempt writes into its own folder, and writing RECORD last commits the checkpoint.
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

from data_prep.storage.failures import WrongContentError, with_retries
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
from pretrain.fail_points import fail_point
from pretrain.stored_config import CONFIG_FILE, read_values_of_run

Result = TypeVar("Result")
logger = logging.getLogger(__name__)

RECORD = "checkpoint.json"
RETRIES = 5  # number of retries after transient failures of remote storage
FOLDER_NAME = re.compile(r"step_(\d{8,})(?:_attempt_(\w+))?")
LEFTOVER_NAME = re.compile(r"\.step_\d+\.(\w+)(?:\.former)?\.tmp")


class DamagedCheckpointError(ValueError):
    """A checkpoint is incomplete, its record is not true, or a checksum differs."""


@dataclass(frozen=True)
class StoredFile:
    """Recorded size and checksum of a file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, order=True)
class StoredCheckpoint:
    """A folder that may hold a complete checkpoint."""

    step: int
    attempt: str  # id of the attempt that wrote it; empty if the folder's name does not include it
    location: str  # path or URL


def open_store(folder: str | Path) -> CheckpointStore:
    """Opens the checkpoint store in a folder or behind a URL."""
    local = local_path(str(folder))
    return ObjectStore(str(folder)) if local is None else CheckpointStore(str(local))


def find_locations(folder: str) -> list[str]:
    """Finds possible checkpoints, newest first.

    Args:
        folder: path or URL of a checkpoint or of a run folder.
    """
    if exists(join(folder, RECORD)):
        return [folder]
    return [each.location for each in store_of_run(folder).checkpoints()]


def store_of_run(folder: str) -> CheckpointStore:
    """Opens the store in which a run keeps its checkpoints.

    Args:
        folder: path or URL of the run folder.

    Raises:
        ConfigError: if the config in the run folder is damaged.
    """
    checkpoint_folder = None
    if not is_url(folder) and (Path(folder) / CONFIG_FILE).exists():
        values = read_values_of_run(Path(folder))
        checkpoint_folder = values.get("run", {}).get("checkpoint_folder")
    return open_store(checkpoint_folder or join(folder, "checkpoints"))


class CheckpointStore:
    """Checkpoints in a folder of a local or network file system with atomic renames.

    Args:
        folder: path, created for the first checkpoint.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def checkpoints(self) -> list[StoredCheckpoint]:
        """Lists all checkpoints that may be complete, newest first."""
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
        """Returns where an attempt writes the files of a step until it commits them."""
        return join(self.folder, f".step_{step:08d}.{attempt}.tmp")

    def begin(self, partial: str) -> None:
        """Creates the temporary folder; every rank calls it before writing there.

        Raises:
            OSError: if the folder cannot be created.
        """
        Path(partial).mkdir(parents=True, exist_ok=True)

    def commit(self, partial: str, step: int) -> None:
        """Commits a written checkpoint atomically and durably.

        Raises:
            OSError: if the folder cannot be renamed.
        """
        for folder in [Path(partial), *(p for p in Path(partial).rglob("*") if p.is_dir())]:
            _flush_folder(folder)
        final = Path(self.folder) / f"step_{step:08d}"
        replaced = Path(partial).with_name(Path(partial).name.replace(".tmp", ".former.tmp"))
        if final.exists():  # a damaged checkpoint; the run resumed from an earlier one
            final.replace(replaced)
        Path(partial).replace(final)
        _flush_folder(Path(self.folder))
        shutil.rmtree(replaced, ignore_errors=True)

    def delete(self, location: str) -> None:
        """Deletes a checkpoint, its record first, so that a partly deleted one is not valid."""
        (Path(location) / RECORD).unlink(missing_ok=True)
        shutil.rmtree(location)

    def abandon(self, partial: str) -> None:
        """Deletes an uncommitted checkpoint, ignoring failures."""
        shutil.rmtree(partial, ignore_errors=True)

    def delete_leftovers(self, attempt: str) -> None:
        """Deletes uncommitted checkpoints of earlier attempts."""
        for name in self._names():
            match = LEFTOVER_NAME.fullmatch(name)
            if match and match.group(1) < attempt:
                self.abandon(join(self.folder, name))


class ObjectStore(CheckpointStore):
    """Checkpoints behind a URL.

    Args:
        folder: URL.
    """

    def _names(self) -> list[str]:
        files, inner = file_system(self.folder)
        files.invalidate_cache()
        try:
            listed = retry_remote(self.folder, lambda: files.ls(inner, detail=False))
        except FileNotFoundError:
            return []
        return [path.rstrip("/").rpartition("/")[2] for path in listed]

    def partial(self, step: int, attempt: str) -> str:
        return join(self.folder, f"step_{step:08d}_attempt_{attempt}")

    def begin(self, partial: str) -> None:
        pass  # object stores have no folders, only names with slashes

    def commit(self, partial: str, step: int) -> None:
        pass  # writing the record has already committed it

    def delete(self, location: str) -> None:
        files, inner = file_system(location)

        def delete() -> None:
            if files.exists(f"{inner}/{RECORD}"):
                files.rm_file(f"{inner}/{RECORD}")
            if files.exists(inner):
                files.rm(inner, recursive=True)

        retry_remote(location, delete)

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


def retry_remote(path: str, action: Callable[[], Result]) -> Result:
    """Calls `action` and returns its result; retries transient errors if `path` is a URL.

    Raises:
        OSError: if the last attempt fails.
    """
    if local_path(path) is not None:
        return action()
    return with_retries(path, action, retries=RETRIES)


def write_file(
    location: str, name: str, chunks: Callable[[], Iterable[bytes | memoryview]]
) -> StoredFile:
    """Writes a file durably, then reads it back and compares checksums.

    Args:
        location: path or URL of the checkpoint, or its temporary folder.
        name: file name in the checkpoint; / separates folders.
        chunks: returns the content; called again for each retry.

    Raises:
        OSError: if the file cannot be written, or its content differs when read back.
    """
    path = join(location, name)
    return retry_remote(path, lambda: _write(path, chunks()))


def _write(path: str, chunks: Iterable[bytes | memoryview]) -> StoredFile:
    written = hashlib.sha256()
    num_bytes = 0
    with _opened_for_writing(path) as file:
        for chunk in chunks:
            file.write(chunk)
            if not num_bytes:
                fail_point("writing")
            written.update(chunk)
            num_bytes += len(chunk)
    found = checksum_of(path)
    if found != written.hexdigest():
        raise WrongContentError(
            f"{path}: expected the sha256 of the written bytes, {written.hexdigest()}; read back "
            f"{found}"
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
            # Drop the page cache, so that reading back reads from the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError as error:
        # On a full disk, the original error does not contain the path.
        raise OSError(error.errno, error.strerror, path) from None


def checksum_of(path: str) -> str:
    """Computes the sha256 of a file, in hexadecimal.

    Raises:
        OSError: if the file cannot be read.
    """

    def read() -> str:
        with open_binary(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retry_remote(path, read)


def verify_file(location: str, name: str, recorded: StoredFile) -> None:
    """Compares the checksum of a file with the recorded one.

    Raises:
        DamagedCheckpointError: if the file is missing, or its checksum differs.
        OSError: if the network or the server fails.
    """
    path = join(location, name)
    try:
        found = checksum_of(path)
    except OSError as error:
        is_missing = isinstance(error, FileNotFoundError)
        if not is_missing and local_path(path) is None:
            raise
        raise DamagedCheckpointError(f"{path}: {error.strerror or error}") from None
    if found != recorded.sha256:
        raise DamagedCheckpointError(
            f"{path}: sha256 is {found}, expected the recorded {recorded.sha256}"
        )


def read_file(location: str, name: str) -> bytes:
    """Reads a small file of a checkpoint.

    Raises:
        OSError: if the file cannot be read.
    """
    path = join(location, name)
    return retry_remote(path, lambda: read_bytes(path))


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
