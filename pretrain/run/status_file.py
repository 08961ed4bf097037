"""The status.json of a run folder: state and step of the run. Reading it needs no torch."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_prep.storage.atomic import write_atomically
from data_prep.storage.sealed import (
    DamagedFileError,
    check_time,
    check_types,
    read_sealed_json,
    to_sealed_json,
    warn_once,
)

logger = logging.getLogger(__name__)

STATUS_FILE = "status.json"
TYPES = {
    "state": str,
    "attempt": str,
    "step": int,
    "num_steps": int | None,
    "last_checkpoint": int | None,
    "updated": str,
}


def write_status_file(folder: Path, values: dict[str, Any]) -> None:
    """Writes the status of a run.

    Args:
        folder: run folder.
        values: a value for every key of `TYPES`.
    """
    write_atomically(folder / STATUS_FILE, to_sealed_json(values, indent=2))


def read_status_file(folder: Path) -> dict[str, Any]:
    """Reads the status of a run; empty if it is not written yet, or damaged, which is logged."""
    path = folder / STATUS_FILE
    try:
        return parse_status(path.read_bytes())
    except FileNotFoundError:
        return {}
    except DamagedFileError as error:
        warn_once(logger, f"{path}: damaged: {error}; a run that goes on writes it anew")
        return {}


def parse_status(content: bytes) -> dict[str, Any]:
    """Parses the content of status.json.

    Raises:
        DamagedFileError: if it is damaged.
    """
    values, _ = read_sealed_json(content, unsealed_keys=TYPES)
    check_types(values, TYPES, optional=("last_checkpoint",))
    check_time(values["updated"], key="updated")
    return values
