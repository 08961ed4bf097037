"""Reads pairs from manifests of text: CSV, TSV and JSONL, line by line.

Bytes that are not UTF-8 come through as lone surrogates, so that only their row is rejected.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from data_prep.config import MakeShards
from data_prep.errors import InputError
from data_prep.sources.input_files import files_of_input, readable_input
from data_prep.sources.pair import Pair, unreadable_row
from data_prep.sources.rows import (
    check_columns,
    kept_json,
    pairs_of_row,
    start_at_manifest,
    wanted_columns,
)
from data_prep.storage import remote_file

MAX_LINE_CHARACTERS = 1 << 24
DELIMITERS = {"csv": ",", "tsv": "\t"}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MAX_KEYS_LISTED = 1000


def read_table(config: MakeShards, *, file_format: str) -> Iterator[Pair]:
    """The pairs of CSV or TSV files, each with a header.

    Args:
        config: input, columns, quotes, keep_columns.
        file_format: "csv" or "tsv".

    Raises:
        InputError: a file is not readable, lacks a column, or its quotation marks do not close.
    """
    files = files_of_input(config, file_format)
    first_row = 0
    for name in files.names:
        path = files.path_of(name)
        reader = _Rows(config, path, file_format=file_format)
        yield from start_at_manifest(reader.pairs(first_row), name, config)
        first_row += reader.num_lines


def read_jsonl(config: MakeShards) -> Iterator[Pair]:
    """The pairs of JSONL files: an object per line, captions a text or a list of texts.

    Raises:
        InputError: a file is not readable, or no line has one of the columns.
    """
    files = files_of_input(config, "jsonl")
    first_row = 0
    for name in files.names:
        path = files.path_of(name)
        reader = _Objects(config, path)
        yield from start_at_manifest(reader.pairs(first_row), name, config)
        first_row += reader.num_lines


# --------------------------------------------------------------------------------- CSV and TSV


class _Rows:
    """The rows of one CSV or TSV file."""

    def __init__(self, config: MakeShards, path: str, *, file_format: str):
        self.config = config
        self.path = path
        self.delimiter = DELIMITERS[file_format]
        self.has_quotes = config.quotes if config.quotes is not None else file_format == "csv"
        self.num_lines = 0  # read so far

    def pairs(self, first_row: int) -> Iterator[Pair]:
        """The pairs; their rows are lines, counted from `first_row` + 1."""
        rows = self._quoted_rows() if self.has_quotes else self._plain_rows()
        header = [name.strip() for name in next(rows, [])]
        wanted = wanted_columns(self.config, with_kept=True)
        check_columns(self.path, header, wanted=wanted)
        place = {name: header.index(name) for name in header}
        columns = self.config.columns
        for fields in rows:
            row = first_row + self.num_lines
            if len(fields) != len(header):
                detail = f"expected {len(header)} columns, found {len(fields)}"
                yield unreadable_row(row, "wrong_column_count", detail)
                continue
            kept = {name: fields[place[name]].strip() for name in self.config.keep_columns}
            yield from pairs_of_row(
                row=row,
                media=fields[place[columns.media]],
                captions=fields[place[columns.caption]],
                class_name=fields[place[columns.class_name]] if columns.class_name else None,
                uid=fields[place[columns.uid]] if columns.uid else None,
                kept=kept_json(kept, kept),
            )

    def _plain_rows(self) -> Iterator[list[str]]:
        for line in read_lines(self.path, newline="\n"):
            self.num_lines += 1
            if line.strip():
                yield line.rstrip("\r\n").split(self.delimiter)

    def _quoted_rows(self) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_LINE_CHARACTERS)  # the module's own is 131,072
        lines = read_lines(self.path, newline="")
        reader = csv.reader(lines, delimiter=self.delimiter, strict=True)
        try:
            for fields in reader:
                self.num_lines = reader.line_num
                if fields:
                    yield fields
        except csv.Error as error:
            raise InputError(
                f"{self.path}: line {reader.line_num}: {error}; if quotation marks in the "
                "captions are just text, set quotes=false"
            ) from None


# --------------------------------------------------------------------------------------- JSONL


class _Objects:
    """The objects of one JSONL file."""

    def __init__(self, config: MakeShards, path: str):
        self.config = config
        self.path = path
        self.num_lines = 0  # read so far
        self._found: dict[str, None] = {}  # keys, until all that are wanted were seen

    def pairs(self, first_row: int) -> Iterator[Pair]:
        """The pairs; their rows are lines, counted from `first_row` + 1."""
        missing = set(wanted_columns(self.config))
        for line in read_lines(self.path, newline="\n"):
            self.num_lines += 1
            if not line.strip():
                continue
            row = first_row + self.num_lines
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield unreadable_row(row, "not_json", str(error))
                continue
            if not isinstance(values, dict):
                yield unreadable_row(row, "not_json", f"expected an object, found {line[:40]!r}")
                continue
            if missing:
                missing.difference_update(values)
                self._list_keys(values)
            yield from self._pairs_of_object(row, values)
        if missing and self._found:
            check_columns(self.path, self._found, wanted=wanted_columns(self.config))

    def _list_keys(self, values: dict[str, Any]) -> None:
        wanted = wanted_columns(self.config)
        for key in values:
            if key in wanted or len(self._found) < MAX_KEYS_LISTED:
                self._found[key] = None

    def _pairs_of_object(self, row: int, values: dict[str, Any]) -> Iterator[Pair]:
        columns = self.config.columns
        yield from pairs_of_row(
            row=row,
            media=values.get(columns.media),
            captions=values.get(columns.caption),
            class_name=values.get(columns.class_name) if columns.class_name else None,
            uid=values.get(columns.uid) if columns.uid else None,
            kept=kept_json(values, self.config.keep_columns),
        )


# --------------------------------------------------------------------------------------- lines


def read_lines(path: str, *, newline: str) -> Iterator[str]:
    """The lines of a file, with their ends.

    Args:
        path: path or URL.
        newline: as of open.

    Raises:
        InputError: the file is not readable, is no text, or has a line of absurd length.
    """
    with readable_input(path), remote_file.open_binary(path) as file:
        if file.peek(2)[:2] in UTF16_MARKS:
            raise InputError(f"{path}: expected text in UTF-8, found UTF-16; save it as UTF-8")
        text = io.TextIOWrapper(
            file, encoding="utf-8-sig", errors="surrogateescape", newline=newline
        )
        for number, line in enumerate(iter(partial(text.readline, MAX_LINE_CHARACTERS), ""), 1):
            if len(line) == MAX_LINE_CHARACTERS:
                raise InputError(
                    f"{path}: line {number} has {MAX_LINE_CHARACTERS:,} characters or more; "
                    "expected a manifest with a pair per line"
                )
            yield line
