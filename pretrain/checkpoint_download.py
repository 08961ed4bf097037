"""Copies of checkpoints behind URLs, for whoever uses the model: fetched once, kept in a cache."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from data_prep.config_file import InputError
from data_prep.remote_file import join, leads_outside, open_binary
from pretrain.checkpoint_record import CheckpointRecord
from pretrain.checkpoint_store import (
    CHUNK_BYTES,
    RECORD,
    DamagedCheckpointError,
    verify_file,
    write_file,
)


def download_model(location: str, record: CheckpointRecord) -> Path:
    """The local copy of a checkpoint behind a URL, without the optimizer's files.

    It lies in $XDG_CACHE_HOME/isopair (default: ~/.cache/isopair), and is made if it is not there.

    Args:
        location: of the checkpoint.
        record: of the checkpoint.

    Raises:
        DamagedCheckpointError: a file is missing, or differs from what was recorded.
        InputError: the record names files outside of the checkpoint.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isopair"
    copy = cache / "checkpoints" / record.model_sha256[:32]
    if copy.exists():
        try:
            verify_model(str(copy), record)
        except DamagedCheckpointError:
            shutil.rmtree(copy)
        else:
            return copy
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        for name, file in record.model_files.items():
            if leads_outside(name):
                raise InputError(f"{location}/{RECORD}: {name}: expected a file of the checkpoint")
            written = write_file(str(partial), name, _chunks_of(join(location, name)))
            if written != file:
                raise DamagedCheckpointError(
                    f"{join(location, name)}: sha256 is {written.sha256}, not {file.sha256}"
                )
        write_file(str(partial), RECORD, [record.to_json()])
        _publish(partial, copy)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"{location}: missing: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return copy


def _publish(partial: Path, copy: Path) -> None:
    try:
        partial.replace(copy)
    except OSError:
        if not copy.exists():  # else another process was faster, with the same files
            raise


def verify_model(location: str, record: CheckpointRecord) -> None:
    """Checks what the model is rebuilt from; the optimizer's files are not looked at.

    Raises:
        DamagedCheckpointError: a file is missing, or differs from what was recorded.
    """
    for name, file in record.model_files.items():
        verify_file(location, name, file)


def _chunks_of(path: str) -> Iterator[bytes]:
    with open_binary(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk
