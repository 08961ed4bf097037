"""checkpoint.json: what a checkpoint records of itself, written last. Needs no torch to be read."""

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
    """Where a run stands, besides its tensors."""

    step: int  # steps done
    num_updates: int  # of the optimizer: steps without those that were skipped
    skipped_steps: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()  # why the result is not a function of the config alone


@dataclass(frozen=True)
class CheckpointRecord:
    """What a checkpoint holds, and how to know that it is whole."""

    state: RunState
    written_by: Mapping[str, Any]  # attempt, processes, strategy, parent of the run
    shapes: Mapping[str, tuple[int, ...]]  # of parameters, by name
    files: Mapping[str, StoredFile]  # all others in the folder

    def to_json(self) -> bytes:
        """The content of checkpoint.json."""
        state = asdict(self.state)
        state[TAGS_KEY] = state.pop("tags")  # the last field, so the order of the keys is kept
        values = {"format_version": FORMAT_VERSION} | state
        values |= {"written_by": dict(self.written_by), "shapes": dict(self.shapes)}
        files = {name: asdict(file) for name, file in sorted(self.files.items())}
        return json.dumps(values | {"files": files}, indent=1).encode() + b"\n"

    @property
    def model_files(self) -> dict[str, StoredFile]:
        """All that the model is rebuilt from: without the optimizer's."""
        return {n: file for n, file in self.files.items() if not n.startswith("optimizer-")}

    @property
    def model_sha256(self) -> str:
        """One sum over the sums of what the model is rebuilt from."""
        sums = {name: file.sha256 for name, file in self.model_files.items()}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def read_record(location: str | Path) -> CheckpointRecord:
    """The record of a checkpoint, a path or URL.

    Raises:
        DamagedCheckpointError: there is none, or it is not readable.
        InputError: it is of another version of the format.
    """
    where = f"{location}/{RECORD}"
    try:
        values = json.loads(read_file(str(location), RECORD))
        version = values["format_version"]
    except FileNotFoundError:
        raise DamagedCheckpointError(f"{where}: missing: it was never finished") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpointError(f"{where}: not readable: {error}") from None
    if version != FORMAT_VERSION:
        raise InputError(
            f"{where}: expected format_version {FORMAT_VERSION}, found {version}: it was written "
            "by another version of isopair; use that one"
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
