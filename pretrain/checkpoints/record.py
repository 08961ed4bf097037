"""The record of a checkpoint, checkpoint.json, which is written last. Reading it needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from pretrain.checkpoints.store import RECORD, DamagedCheckpointError, StoredFile, read_file

FORMAT_VERSION = 2
TAGS_KEY = "marks"  # name of RunState.tags in the file


@dataclass(frozen=True)
class RunState:
    """Progress of a run, in addition to its tensors."""

    step: int  # steps completed
    num_updates: int  # optimizer updates: steps without the skipped ones
    skipped_steps: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()  # reasons why the result is not a function of the config alone


@dataclass(frozen=True)
class CheckpointRecord:
    """Content of a checkpoint, with what is needed to verify that it is complete."""

    state: RunState
    written_by: Mapping[str, Any]  # attempt, number of processes, strategy, parent of the run
    shapes: Mapping[str, tuple[int, ...]]  # parameter name -> shape
    files: Mapping[str, StoredFile]  # name -> size and checksum, of all other files in the folder

    def to_json(self) -> bytes:
        """Returns the content of checkpoint.json."""
        state = asdict(self.state)
        state[TAGS_KEY] = state.pop("tags")  # the last field, so the order of the keys is kept
        values = {"format_version": FORMAT_VERSION} | state
        values |= {"written_by": dict(self.written_by), "shapes": dict(self.shapes)}
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        return json.dumps(values | {"files": files}, indent=1).encode() + b"\n"

    @property
    def model_files(self) -> dict[str, StoredFile]:
        """The files needed to rebuild the model: all except the optimizer's."""
        return {n: file for n, file in self.files.items() if not n.startswith("optimizer-")}

    @property
    def model_sha256(self) -> str:
        """A checksum over the checksums of `model_files`."""
        sums = {name: file.sha256 for name, file in self.model_files.items()}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def read_record(location: str | Path) -> CheckpointRecord:
    """Reads the record of a checkpoint.

    Args:
        location: path or URL of the checkpoint.

    Raises:
        DamagedCheckpointError: if the record is missing or not readable.
        InputError: if the record has a different format version.
    """
    where = f"{location}/{RECORD}"
    try:
        values = json.loads(read_file(str(location), RECORD))
        version = values["format_version"]
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{where}: missing: it was never committed") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{where}: not readable: {error}") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{where}: expected format_version {FORMAT_VERSION}, found {version}: it was written "
            "by another version of isopair; use that version"
        )
    return CheckpointRecord(
        state=RunState(
            step=values["step"],
            num_updates=values["num_updates"],
            skipped_steps=tuple(values["skipped_steps"]),
            tags=tuple(values[TAGS_KEY]),
        ),
        written_by=values["written_by"],
        shapes={name: tuple(shape) for name, shape in values["shapes"].items()},
        files={name: StoredFile(**file) for name, file in values["files"].items()},
    )
