"""Pairs from text manifests (CSV, TSV and JSONL), read line by line.

Bytes that are not UTF-8 become lone surrogates, so that only their own row is rejected.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

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
from data_prep.sources.sample_rows import SampleRows, sample_rows
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
        yield from reader.read(first_row, name)
        first_row += reader.num_lines


def read_jsonl(source: PairSource) -> Iterator[Pair]:
    """Yields the pairs of JSONL files: one object per line, with one caption or a list of captions.

    Raises:
        InputError: if a file is unreadable, or a required column is missing from every line.
    """
    files = files_of_input(source.input, "jsonl")
    first_row = 0
    for name in files.names:
        reader = _JsonlReader(files.path_of(name), source)
        yield from reader.read(first_row, name)
        first_row += reader.num_lines


# --------------------------------------------------------------------------------- CSV and TSV


class _TableReader:
    """Reader of the pairs of one CSV or TSV file."""

    def __init__(self, path: str, source: PairSource, *, file_format: str):
        self.source = source
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

    def read(self, first_row: int, name: str) -> Iterator[Pair]:
        """Yields the pairs; their rows are line numbers, counted from `first_row` + 1.

        Args:
            first_row: number of the last row before this file.
            name: name of the file, relative to the input's folder.
        """
        if self.source.media is None:
            return self._samples(first_row, sample_rows(self.source, name))
        pairs = self._pairs(first_row)
        return resolve_media_paths(pairs, name, media_root=self.source.media_root)

    def _rows(self, first_row: int) -> Iterator[tuple[int, list[str] | Pair]]:
        """Yields the number of each row with its fields, or with the pair that rejects it."""
        header = self.file.header
        for fields in self.file.rows():
            row = first_row + self.num_lines
            if len(fields) == len(header):
                yield row, fields
                continue
            detail = f"expected {len(header)} columns, found {len(fields)}"
            yield row, unreadable_row(row, "wrong_column_count", detail)

    def _samples(self, first_row: int, samples: SampleRows) -> Iterator[Pair]:
        for row, fields in self._rows(first_row):
            if isinstance(fields, Pair):
                yield fields
                continue
            cells = dict(zip(self.file.header, map(str.strip, fields), strict=True))
            yield samples.pair(row, cells.get)

    def _pairs(self, first_row: int) -> Iterator[Pair]:
        header, columns = self.file.header, self.columns
        index_of = {name: header.index(name) for name in header}
        for row, fields in self._rows(first_row):
            if isinstance(fields, Pair):
                yield fields
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

    def __init__(self, path: str, source: PairSource):
        self.path = path
        self.source = source
        self.columns = source.columns
        self.keep_columns = source.keep_columns
        self.num_lines = 0  # read so far
        self._wanted = wanted_columns(source.columns)
        self._found: dict[str, None] = {}  # keys seen until all wanted keys were found

    def read(self, first_row: int, name: str) -> Iterator[Pair]:
        """Yields the pairs; their rows are line numbers, counted from `first_row` + 1.

        Args:
            first_row: number of the last row before this file.
            name: name of the file, relative to the input's folder.
        """
        if self.source.media is None:
            samples = sample_rows(self.source, name)
            for row, values in self._objects(first_row):
                yield values if isinstance(values, Pair) else samples.pair(row, values.get)
            return
        pairs = self._pairs(first_row)
        yield from resolve_media_paths(pairs, name, media_root=self.source.media_root)

    def _pairs(self, first_row: int) -> Iterator[Pair]:
        for row, values in self._objects(first_row):
            if isinstance(values, Pair):
                yield values
            else:
                yield from self._pairs_of_object(row, values)

    def _objects(self, first_row: int) -> Iterator[tuple[int, dict[str, Any] | Pair]]:
        """Yields the number of each line with its object, or with the pair that rejects it."""
        missing = set(self._wanted)
        for line in read_lines(self.path, newline="\n"):
            self.num_lines += 1
            if not line.strip():
                continue
            row = first_row + self.num_lines
            try:
                values = json_object(line)
            except (ValueError, RecursionError) as error:
                yield row, unreadable_row(row, "not_json", str(error))
                continue
            if missing:
                missing.difference_update(values)
                self._list_keys(values)
            yield row, values
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
