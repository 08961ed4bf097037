"""The record of a checkpoint, checkpoint.json, which is written last. Reading it needs no torch."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import InputError
from data_prep.storage.remote_file import is_url, points_outside
from data_prep.storage.sealed import (
    DamagedFileError,
    check_types,
    read_sealed_json,
    to_sealed_json,
)
from pretrain.checkpoints.store import (
    FOLDER_NAME,
    RECORD,
    DamagedCheckpointError,
    StoredFile,
    read_file,
)

WeightsKind = Literal["plain", "ema"]  # the trained weights, or their averages
OPTIMIZER_PREFIX, EMA_PREFIX = "optimizer-", "ema-"  # of files that plain weights do not need
FORMAT_VERSION = 3
UNSEALED_VERSION = 2  # its records hold no checksum of themselves
TAGS_KEY = "marks"  # name of RunState.tags in the file
TYPES = {
    "format_version": int,
    "step": int,
    "num_updates": int,
    "skipped_steps": list[int],
    TAGS_KEY: list[str],
    "written_by": dict,
    "shapes": dict[str, list[int]],
    "files": dict[str, dict],
}
FILE_TYPES = {"num_bytes": int, "sha256": str}
SHA256 = re.compile(r"[0-9a-f]{64}")
ATTEMPT = re.compile(r"[0-9]{4,}")
MOST_STEPS = 10**15
LARGEST_SIZE = 2**62


@dataclass(frozen=True)
class RunState:
    """Progress of a run, in addition to its tensors."""

    step: int  # steps completed
    num_updates: int  # optimizer updates, which exclude skipped steps
    skipped_steps: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()  # reasons why the result is not a function of the config alone

    def num_updates_before(self, step: int) -> int:
        """Returns the optimizer updates in the first `step` steps."""
        return step - sum(each <= step for each in self.skipped_steps)


@dataclass(frozen=True)
class CheckpointRecord:
    """Content of a checkpoint, with sizes and checksums to verify it."""

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
        return to_sealed_json(values | {"files": files}, indent=1)

    @property
    def has_ema(self) -> bool:
        """Whether the checkpoint holds averages of the trained weights."""
        return any(name.startswith(EMA_PREFIX) for name in self.files)

    @property
    def model_sha256(self) -> str:
        """A checksum of the model with its plain weights."""
        return self.sha256_of("plain")

    def files_of(self, weights: WeightsKind) -> dict[str, StoredFile]:
        """Returns the files needed to rebuild the model with its plain weights or their averages.

        Frozen parameters have no averages, so the averages need all files of the model.
        """
        others = (OPTIMIZER_PREFIX,) if weights == "ema" else (OPTIMIZER_PREFIX, EMA_PREFIX)
        return {name: file for name, file in self.files.items() if not name.startswith(others)}

    def sha256_of(self, weights: WeightsKind) -> str:
        """Returns a checksum over the checksums of `files_of`."""
        sums = {name: file.sha256 for name, file in self.files_of(weights).items()}
        return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()

    def refuse_missing_ema(self, weights: WeightsKind, *, location: str) -> None:
        """Checks that the checkpoint holds the weights.

        Raises:
            InputError: if they are averages, and it holds none.
        """
        if weights == "ema" and not self.has_ema:
            raise InputError(
                f"{location}: expected averages of the weights (weights: ema), found none: the run "
                "was trained without optimizer.ema; use weights: plain"
            )


def read_record(location: str | Path) -> CheckpointRecord:
    """Reads the record of a checkpoint, and verifies all that it says of itself.

    Args:
        location: path or URL of the checkpoint.

    Raises:
        DamagedCheckpointError: if the record is missing, not readable or not true.
        InputError: if another version of isopair wrote it.
        OSError: if the network or the server fails.
    """
    location = str(location)
    try:
        content = read_file(location, RECORD)
    except FileNotFoundError:
        raise DamagedCheckpointError(
            f"{location}/{RECORD}: missing: it was never committed"
        ) from None
    except OSError as error:
        if is_url(location):
            raise
        raise DamagedCheckpointError(f"{location}/{RECORD}: not readable: {error}") from None
    return parse_record(content, location=location)


def parse_record(content: bytes, *, location: str) -> CheckpointRecord:
    """Parses the content of checkpoint.json.

    Args:
        content: content of the file.
        location: path or URL of the checkpoint, whose name may include the step and the attempt.

    Raises:
        DamagedCheckpointError: if the content is not what was written.
        InputError: if another version of isopair wrote it.
    """
    where = f"{location}/{RECORD}"
    try:
        values, is_sealed = read_sealed_json(content, unsealed_keys=TYPES)
        version = values.get("format_version")
        if is_sealed and version != FORMAT_VERSION:  # its checksum is right: it is not damaged
            raise InputError(
                f"{where}: expected format_version {FORMAT_VERSION}, found {version}: it was "
                "written by another version of isopair; use that version"
            )
        if not is_sealed and version != UNSEALED_VERSION:
            raise DamagedFileError(
                f"expected format_version {FORMAT_VERSION} and a checksum, or format_version "
                f"{UNSEALED_VERSION}; found {version!r} and no checksum"
            )
        check_types(values, TYPES)
        state = _state_in(values)
        _check_origin(values["written_by"], state, location=location)
        _check_shapes(values["shapes"])
        files = _files_in(values["files"])
    except DamagedFileError as error:
        raise DamagedCheckpointError(f"{where}: {error}") from None
    shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
    return CheckpointRecord(state, values["written_by"], shapes, files)


def _state_in(values: Mapping[str, Any]) -> RunState:
    step, num_updates, skipped = (values[k] for k in ("step", "num_updates", "skipped_steps"))
    if not 0 <= step <= MOST_STEPS:
        raise DamagedFileError(f"step: expected 0 to {MOST_STEPS}, found {step!r:.80}")
    if not all(a < b for a, b in pairwise([0, *skipped, step + 1])):
        raise DamagedFileError(
            f"skipped_steps: expected increasing steps from 1 to {step}, found {skipped!r:.80}"
        )
    if num_updates != step - len(skipped):
        raise DamagedFileError(
            f"num_updates: expected {step - len(skipped)}, which is step={step} without "
            f"{len(skipped)} skipped steps, found {num_updates!r:.80}"
        )
    return RunState(step, num_updates, tuple(skipped), tuple(values[TAGS_KEY]))


def _check_origin(written_by: Mapping[str, Any], state: RunState, *, location: str) -> None:
    check_types(written_by, {"attempt": str})
    attempt = written_by["attempt"]
    if not ATTEMPT.fullmatch(attempt):
        raise DamagedFileError(f"written_by.attempt: expected a number, found {attempt!r:.80}")
    name = FOLDER_NAME.fullmatch(location.rstrip("/").rpartition("/")[2])
    if name and int(name.group(1)) != state.step:
        raise DamagedFileError(
            f"step: expected {int(name.group(1))}, as in the folder's name, found {state.step}"
        )
    if name and name.group(2) not in (None, attempt):
        raise DamagedFileError(
            f"written_by.attempt: expected {name.group(2)!r}, as in the folder's name, found "
            f"{attempt!r:.80}"
        )


def _check_shapes(shapes: Mapping[str, list[int]]) -> None:
    for name, shape in shapes.items():
        if not all(0 <= size <= LARGEST_SIZE for size in shape):
            raise DamagedFileError(f"shapes.{name}: expected sizes, found {shape!r:.80}")


def _files_in(files: Mapping[str, Mapping[str, Any]]) -> dict[str, StoredFile]:
    found = {}
    for name, file in files.items():
        if not name or name.startswith("/") or points_outside(name):
            raise DamagedFileError(
                f"files: expected names of files in the checkpoint, found {name!r:.80}"
            )
        check_types(file, FILE_TYPES)
        if not (len(file) == 2 and file["num_bytes"] >= 0 and SHA256.fullmatch(file["sha256"])):
            raise DamagedFileError(
                f"files.{name}: expected num_bytes and sha256, found {file!r:.120}"
            )
        found[name] = StoredFile(**file)
    return found
