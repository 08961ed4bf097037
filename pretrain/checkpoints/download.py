"""Local copies of remote checkpoints: downloaded once, without moments, and cached."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from data_prep.storage.failures import WrongContentError
from data_prep.storage.file_transfer import fetch_file
from data_prep.storage.remote_file import join
from pretrain.checkpoints.record import CheckpointRecord, WeightsKind
from pretrain.checkpoints.store import (
    RECORD,
    RETRIES,
    DamagedCheckpointError,
    verify_file,
    write_file,
)


def download_model(
    location: str, record: CheckpointRecord, *, weights: WeightsKind = "plain"
) -> Path:
    """Downloads the files of a checkpoint's model, unless a valid copy is cached.

    The cache is $XDG_CACHE_HOME/isopair (default: ~/.cache/isopair).

    Args:
        location: URL of the checkpoint.
        record: record of the checkpoint.
        weights: weights to download.

    Returns:
        Path of the copy.

    Raises:
        DamagedCheckpointError: if a file is missing or differs from the record.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isopair"
    copy = cache / "checkpoints" / record.sha256_of(weights)[:32]
    if copy.exists():
        try:
            verify_model(str(copy), record, weights=weights)
        except DamagedCheckpointError:
            shutil.rmtree(copy)
        else:
            return copy
    partial = copy.with_name(f".{copy.name}.{os.getpid()}.tmp")
    try:
        for name, file in record.files_of(weights).items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            fetch_file(join(location, name), target, retries=RETRIES, sha256=file.sha256)
        write_file(str(partial), RECORD, lambda: [record.to_json()])
        _publish(partial, copy)
    except (FileNotFoundError, WrongContentError) as error:
        raise DamagedCheckpointError(str(error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return copy


def _publish(partial: Path, copy: Path) -> None:
    try:
        partial.replace(copy)
    except OSError:
        if not copy.exists():  # otherwise another process has published the same files
            raise


def verify_model(
    location: str, record: CheckpointRecord, *, weights: WeightsKind = "plain"
) -> None:
    """Verifies the files of a checkpoint's model.

    Raises:
        DamagedCheckpointError: if a file is missing or differs from the record.
    """
    for name, file in record.files_of(weights).items():
        verify_file(location, name, file)
