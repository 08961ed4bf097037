"""Pairs from text manifests (CSV, TSV and JSONL), read line by line.

Bytes that are not UTF-8 become lone surrogates, so that only their own row is rejected.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import partial
from typing import Any

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.sources.input_files import PairSource, files_of_input, readable_input
from data_prep.sources.pair import Pair, unreadable_row
from data_prep.sources.rows import (
    check_columns,
    kept_json,
    pairs_of_row,
    resolve_media_paths,
    wanted_columns,
)
from data_prep.storage import remote_file

MAX_LINE_CHARACTERS = 1 << 24
DELIMITERS = {"csv": ",", "tsv": "\t"}
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
MAX_KEYS_LISTED = 1000


def read_table(source: PairSource, *, file_format: str) -> Iterator[Pair]:
    """Yields the pairs of CSV or TSV files, each with a header.

    Args:
        source: the input and its settings.
        file_format: "csv" or "tsv".

    Raises:
        InputError: if a file is unreadable, lacks a column, or has unbalanced quotation marks.
    """
    has_quotes = source.quotes if source.quotes is not None else file_format == "csv"
    files = files_of_input(source.input, file_format)
    first_row = 0
    for name in files.names:
        reader = _TableReader(
            files.path_of(name),
            columns=source.columns,
            keep_columns=source.keep_columns,
            delimiter=DELIMITERS[file_format],
            has_quotes=has_quotes,
        )
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
    """Reader of one CSV or TSV file."""

    def __init__(
        self,
        path: str,
        *,
        columns: Columns,
        keep_columns: tuple[str, ...],
        delimiter: str,
        has_quotes: bool,
    ):
        self.path = path
        self.columns = columns
        self.keep_columns = keep_columns
        self.delimiter = delimiter
        self.has_quotes = has_quotes
        self.num_lines = 0  # read so far

    def pairs(self, first_row: int) -> Iterator[Pair]:
        """Yields the pairs; their rows are line numbers, counted from `first_row` + 1."""
        rows = self._quoted_rows() if self.has_quotes else self._plain_rows()
        header = [name.strip() for name in next(rows, [])]
        check_columns(self.path, header, wanted=wanted_columns(self.columns, self.keep_columns))
        index_of = {name: header.index(name) for name in header}
        columns = self.columns
        for fields in rows:
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

    def _plain_rows(self) -> Iterator[list[str]]:
        for line in read_lines(self.path, newline="\n"):
            self.num_lines += 1
            if line.strip():
                yield line.rstrip("\r\n").split(self.delimiter)

    def _quoted_rows(self) -> Iterator[list[str]]:
        csv.field_size_limit(MAX_LINE_CHARACTERS)  # the csv module's default is 131,072
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
                "captions are plain text, set quotes=false"
            ) from None


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


# --------------------------------------------------------------------------------------- lines


def read_lines(path: str, *, newline: str) -> Iterator[str]:
    """Yields the lines of a file, with their line endings.

    Args:
        path: path or URL.
        newline: as in `open`.

    Raises:
        InputError: if the file is unreadable, is UTF-16, or has a line of
            `MAX_LINE_CHARACTERS` or more.
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
                    "expected a manifest with one pair per line"
                )
            yield line
