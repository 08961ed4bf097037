"""The account of a warm start: the origin of every tensor.

    taken       copied from the source
    resampled   the same after interpolation, or after cutting or extending
    kept        not in need of a value: constants, and parameters that no feature depends on
    other part  of the source's other towers, or of its temperature
    unused      of this tower in the source, without a counterpart here
    missing     of this tower here, without a counterpart in the source

Unused and missing tensors stop the run unless the config names them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from data_prep.errors import ConfigError

Status = Literal["taken", "resampled", "kept", "other part", "unused", "missing"]
STATUSES: tuple[Status, ...] = ("taken", "resampled", "kept", "other part", "unused", "missing")
MOST_LINES = 12  # of an error message
SEPARATOR = " + "  # of the names that one tensor of a tower comes from
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True)
class KeyRow:
    """One tensor.

    Attributes:
        status: how the tensor is used.
        source: names in the source, joined by " + "; empty if it is missing there.
        tower: name in the tower; empty if it is not used.
        source_shape: shape in the source.
        tower_shape: shape in the tower.
    """

    status: Status
    source: str = ""
    tower: str = ""
    source_shape: tuple[int, ...] | None = None
    tower_shape: tuple[int, ...] | None = None

    @property
    def name(self) -> str:
        """Name that the patterns of a config are compared with."""
        return self.tower if self.status == "missing" else self.source


@dataclass(frozen=True)
class KeyTable:
    """The account of the warm start of one tower, or of one module of an objective.

    Attributes:
        kind: name of the tower or module; that of a module has a colon.
        location: path, URL or name of the source.
        rows: every tensor of the source and of the tower.
    """

    kind: str
    location: str
    rows: tuple[KeyRow, ...]

    def counts(self) -> dict[Status, int]:
        """Counts the rows of each status."""
        counted = Counter(row.status for row in self.rows)
        return {status: counted[status] for status in STATUSES}

    def describe(self, *, sha256: str) -> list[str]:
        """Describes the table in lines; layers of equal names and shapes share one.

        Args:
            sha256: fingerprint of the source's files.
        """
        counts = ", ".join(f"{number} {status}" for status, number in self.counts().items())
        what = "module" if ":" in self.kind else "tower"
        return [
            f"{self.kind} {what} starts from {self.location} (sha256 {sha256}): {counts}",
            *(f"  {line}" for line in _lines(r for r in self.rows if r.status != "other part")),
        ]


def refuse_unnamed_keys(
    rows: Sequence[KeyRow], *, expect_missing: Sequence[str], ignore: Sequence[str], where: str
) -> None:
    """Checks that unused and missing tensors are those that the config names.

    Args:
        rows: rows of a table.
        expect_missing: patterns of names in the tower.
        ignore: patterns of names in the source.
        where: config key of the warm start.

    Raises:
        ConfigError: if a tensor is not named, with the lines to write; or if a pattern fits none.
    """
    patterns = {"missing": expect_missing, "unused": ignore}
    unnamed = {
        status: [
            row for row in rows if row.status == status and not _fits(row.name, patterns[status])
        ]
        for status in patterns
    }
    if any(unnamed.values()):
        raise ConfigError(
            _describe_unnamed(
                unnamed, rows, expect_missing=expect_missing, ignore=ignore, where=where
            )
        )
    for key, status in (("expect_missing", "missing"), ("ignore", "unused")):
        names = [name for row in rows for name in _names(row, key)]
        for pattern in patterns[status]:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"{where}.{key}: {pattern!r} fits no tensor; correct or remove it (names are "
                    f"such as {', '.join(names[:3])})"
                )


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _describe_unnamed(
    unnamed: dict[str, list[KeyRow]],
    rows: Sequence[KeyRow],
    *,
    expect_missing: Sequence[str],
    ignore: Sequence[str],
    where: str,
) -> str:
    lines = list(_lines(row for status in unnamed.values() for row in status))
    more = [f"and {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
    advice = []
    for key, status, named in (
        ("expect_missing", "missing", expect_missing),
        ("ignore", "unused", ignore),
    ):
        if unnamed[status]:
            others = [name for row in rows if row.status != status for name in _names(row, key)]
            patterns = _patterns([row.name for row in unnamed[status]], others=others)
            advice.append(f"{key}: {json.dumps([*named, *patterns])}")
    return "\n  ".join(
        [
            f"{where}: expected a value for every tensor of the tower and a use for every tensor "
            f"of the source, found {len(unnamed['missing'])} missing in the source and "
            f"{len(unnamed['unused'])} unused:",
            *lines[:MOST_LINES],
            *more,
            f"if this is intended, write under {where}: {', '.join(advice)}",
        ]
    )


def _names(row: KeyRow, key: str) -> list[str]:
    """The names in a row that the patterns of a config key are compared with"""
    name = row.tower if key == "expect_missing" else row.source
    return [name, *name.split(SEPARATOR)] if name else []


def _patterns(names: Iterable[str], *, others: Sequence[str]) -> list[str]:
    """Short patterns that fit all names and none of the others"""
    found: list[str] = []
    for name in names:
        if not _fits(name, found):
            starred = _NUMBER.sub("*", name)
            candidates = [
                ".".join([*parts.split(".")[:length], "*"])
                for length in range(1, name.count(".") + 1)
                for parts in (starred, name)
            ]
            candidates.append(starred)
            fitting = (p for p in candidates if not any(fnmatchcase(o, p) for o in others))
            found.append(next(fitting, name))
    return found


def _lines(rows: Iterable[KeyRow]) -> Iterator[str]:
    grouped: dict[KeyRow, list[KeyRow]] = {}
    for row in rows:
        alike = KeyRow(
            row.status,
            _NUMBER.sub("*", row.source),
            _NUMBER.sub("*", row.tower),
            row.source_shape,
            row.tower_shape,
        )
        grouped.setdefault(alike, []).append(row)
    for alike, each in sorted(grouped.items(), key=lambda item: STATUSES.index(item[0].status)):
        row = each[0] if len(each) == 1 else alike
        times = f" ({len(each)} times)" if len(each) > 1 else ""
        yield f"{row.status:<10} {_describe_names(row)}{_describe_shapes(row)}{times}"


def _describe_names(row: KeyRow) -> str:
    names = [name for name in (row.source, row.tower) if name]
    return " -> ".join(dict.fromkeys(names))


def _describe_shapes(row: KeyRow) -> str:
    shapes = [list(shape) for shape in (row.source_shape, row.tower_shape) if shape is not None]
    if len(shapes) == 2 and shapes[0] == shapes[1]:
        shapes = shapes[:1]
    return " " + " -> ".join(str(shape) for shape in shapes)
