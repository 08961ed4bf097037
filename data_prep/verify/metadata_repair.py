"""Reading of damaged manifest.jsonl and dataset.json: what they record is saved as far as possible.

A flipped bit is undone with the help of the seal. Lines of manifest.jsonl that cannot be read are
left out; the shards that they describe are found by their indexes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import InputError
from data_prep.shards.manifest import (
    DatasetInfo,
    ManifestRow,
    inspect_info,
    parse_info,
    parse_manifest,
)
from data_prep.storage.sealed import (
    ROW_SEAL,
    DamagedFileError,
    read_sealed_json,
    read_sealed_row,
)
from data_prep.verify.bit_flips import undo_flip

log = logging.getLogger(__name__)

MAX_LINES_JOINED = 3  # a flipped bit damages one line, or makes two of one, or one of two


@dataclass
class SavedMetadata:
    """The readable content of dataset.json and manifest.jsonl."""

    info: DatasetInfo | None  # None: unreadable
    is_info_sealed: bool  # whether the seal shows that the content is as it was written
    seal_problem: str | None = None  # of a readable dataset.json
    rows: dict[str, ManifestRow] = field(default_factory=dict)
    unsealed: list[str] = field(default_factory=list)  # names of rows without a seal
    notes: list[str] = field(default_factory=list)  # for the user
    unreadable: list[Path] = field(default_factory=list)  # files with parts that were left out


def read_metadata(folder: Path) -> SavedMetadata:
    """Reads both files, and undoes a flipped bit in each damaged part."""
    saved = _read_info(folder / "dataset.json")
    path = folder / "manifest.jsonl"
    for line in _saved_lines(path, saved) if path.is_file() else ():
        (row,) = parse_manifest(line, path)
        saved.rows[row.name] = row
        if not ROW_SEAL.fullmatch(line):
            saved.unsealed.append(row.name)
    return saved


# -------------------------------------------------------------------------------- dataset.json


def _read_info(path: Path) -> SavedMetadata:
    try:
        content = path.read_bytes()
    except OSError:
        return SavedMetadata(None, is_info_sealed=False)
    if _is_sealed_info(content):
        return SavedMetadata(parse_info(content, path), is_info_sealed=True)
    restored = undo_flip(content, _is_sealed_info)
    if restored is not None:
        note = f"{path}: undid a flipped bit"
        return SavedMetadata(parse_info(restored, path), is_info_sealed=True, notes=[note])
    try:
        info, problem = inspect_info(content, path)
        return SavedMetadata(info, is_info_sealed=False, seal_problem=problem)
    except InputError as error:
        log.warning("%s", error)
        unreadable = [path] if content else []
        return SavedMetadata(None, is_info_sealed=False, unreadable=unreadable)


def _is_sealed_info(content: bytes) -> bool:
    try:
        _, is_sealed = read_sealed_json(content, unsealed_keys=())
        return is_sealed and inspect_info(content, "dataset.json")[1] is None
    except (InputError, DamagedFileError):
        return False


# ------------------------------------------------------------------------------ manifest.jsonl


def _saved_lines(path: Path, saved: SavedMetadata) -> Iterator[bytes]:
    """Yields the lines that can be read, with flipped bits undone."""
    damaged: list[bytes] = []
    for line in [*path.read_bytes().split(b"\n"), None]:
        if line is not None and line and not _is_valid(line):
            damaged.append(line)
            continue
        yield from _undone(damaged, path, saved)
        damaged = []
        if line:
            yield line


def _undone(damaged: list[bytes], path: Path, saved: SavedMetadata) -> list[bytes]:
    if not damaged:
        return []
    restored = None
    if len(damaged) <= MAX_LINES_JOINED:
        restored = undo_flip(b"\n".join(damaged), _are_sealed_rows)
    if restored is None:
        log.warning("%s: %d damaged lines are left out", path, len(damaged))
        saved.unreadable += [path] if path not in saved.unreadable else []
        return []
    saved.notes.append(f"{path}: undid a flipped bit")
    return restored.removesuffix(b"\n").split(b"\n")


def _are_sealed_rows(content: bytes) -> bool:
    lines = content.removesuffix(b"\n").split(b"\n")
    return all(ROW_SEAL.fullmatch(line) and _is_valid(line) for line in lines)


def _is_valid(line: bytes) -> bool:
    try:
        read_sealed_row(line)  # fails faster
        return len(parse_manifest(line, "manifest.jsonl")) == 1
    except (InputError, DamagedFileError):
        return False
