"""Pairs from text manifests (CSV, TSV and JSONL), read line by line.

Bytes that are not UTF-8 become lone surrogates, so that only their own row is rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from data_prep.config import Columns
from data_prep.sources.delimited import DelimitedFile
from data_prep.sources.input_files import PairSource, files_of_input
from data_prep.sources.pair import Pair, unreadable_row
from data_prep.sources.rows import (
    check_columns,
    kept_json,
    pairs_of_row,
    resolve_media_paths,
    wanted_columns,
)
from data_prep.sources.text_lines import read_lines

MAX_KEYS_LISTED = 1000
# Advice for a header in one piece, whose separator may be one that is not detected
NO_SEPARATOR = "; if another character separates the columns, set {}separator"


def read_table(source: PairSource, *, file_format: str) -> Iterator[Pair]:
    """Yields the pairs of CSV or TSV files, each with a header.

    Args:
        source: the input and its settings.
        file_format: "csv" or "tsv".

    Raises:
        InputError: if a file is unreadable, lacks a column, or has unbalanced quotation marks.
    """
    files = files_of_input(source.input, file_format)
    first_row = 0
    for name in files.names:
        reader = _TableReader(files.path_of(name), source, file_format=file_format)
        yield from resolve_media_paths(reader.pairs(first_row), name, media_root=source.media_root)
        first_row += reader.num_lines


def read_jsonl(source: PairSource) -> Iterator[Pair]:
    """Yields the pairs of JSONL files: one object per line, with one caption or a list of captions.

    Raises:
        InputError: if a file is unreadable, or a required column is missing from every line.
    """
    files = files_of_input(source.input, "jsonl")
    first_row = 0
    for name in files.names:
        reader = _JsonlReader(
            files.path_of(name), columns=source.columns, keep_columns=source.keep_columns
        )
        yield from resolve_media_paths(reader.pairs(first_row), name, media_root=source.media_root)
        first_row += reader.num_lines


# --------------------------------------------------------------------------------- CSV and TSV


class _TableReader:
    """Reader of the pairs of one CSV or TSV file."""

    def __init__(self, path: str, source: PairSource, *, file_format: str):
        self.columns, self.keep_columns = source.columns, source.keep_columns
        wanted = wanted_columns(self.columns, self.keep_columns)
        self.file = DelimitedFile(
            path,
            file_format=file_format,
            wanted=wanted,
            separator=source.separator,
            quotes=source.quotes,
        )
        advice = NO_SEPARATOR.format("") if len(self.file.header) == 1 else ""
        check_columns(path, self.file.header, wanted=wanted, advice=advice)

    @property
    def num_lines(self) -> int:
        """Lines read so far."""
        return self.file.num_lines

    def pairs(self, first_row: int) -> Iterator[Pair]:
        """Yields the pairs; their rows are line numbers, counted from `first_row` + 1."""
        header, columns = self.file.header, self.columns
        index_of = {name: header.index(name) for name in header}
        for fields in self.file.rows():
            row = first_row + self.num_lines
            if len(fields) != len(header):
                detail = f"expected {len(header)} columns, found {len(fields)}"
                yield unreadable_row(row, "wrong_column_count", detail)
                continue
            kept = {name: fields[index_of[name]].strip() for name in self.keep_columns}
            yield from pairs_of_row(
                row=row,
                media=fields[index_of[columns.media]],
                captions=fields[index_of[columns.caption]],
                class_name=fields[index_of[columns.class_name]] if columns.class_name else None,
                uid=fields[index_of[columns.uid]] if columns.uid else None,
                kept=kept_json(kept, kept),
            )


# --------------------------------------------------------------------------------------- JSONL


class _JsonlReader:
    """Reader of one JSONL file."""

    def __init__(self, path: str, *, columns: Columns, keep_columns: tuple[str, ...]):
        self.path = path
        self.columns = columns
        self.keep_columns = keep_columns
        self.num_lines = 0  # read so far
        self._wanted = wanted_columns(columns)
        self._found: dict[str, None] = {}  # keys seen until all wanted keys were found

    def pairs(self, first_row: int) -> Iterator[Pair]:
        """Yields the pairs; their rows are line numbers, counted from `first_row` + 1."""
        missing = set(self._wanted)
        for line in read_lines(self.path, newline="\n"):
            self.num_lines += 1
            if not line.strip():
                continue
            row = first_row + self.num_lines
            try:
                values = json_object(line)
            except (ValueError, RecursionError) as error:
                yield unreadable_row(row, "not_json", str(error))
                continue
            if missing:
                missing.difference_update(values)
                self._list_keys(values)
            yield from self._pairs_of_object(row, values)
        if missing and self._found:
            check_columns(self.path, self._found, wanted=self._wanted)

    def _list_keys(self, values: dict[str, Any]) -> None:
        for key in values:
            if key in self._wanted or len(self._found) < MAX_KEYS_LISTED:
                self._found[key] = None

    def _pairs_of_object(self, row: int, values: dict[str, Any]) -> Iterator[Pair]:
        columns = self.columns
        yield from pairs_of_row(
            row=row,
            media=values.get(columns.media),
            captions=values.get(columns.caption),
            class_name=values.get(columns.class_name) if columns.class_name else None,
            uid=values.get(columns.uid) if columns.uid else None,
            kept=kept_json(values, self.keep_columns),
        )


def json_object(line: str) -> dict[str, Any]:
    """Parses a line of a JSONL file.

    Raises:
        ValueError: if the line is not JSON, or not an object.
        RecursionError: if the line is nested too deeply.
    """
    values = json.loads(line)
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found {line[:40]!r}")
    return values
