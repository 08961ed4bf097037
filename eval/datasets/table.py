"""Evaluation sets from a table of media files and their labels.

table.csv, .tsv or .jsonl, also compressed: one or more rows per file, with captions or classes in
columns (see eval.datasets.columns). All columns are available as the sample's .json. Separators and
quotation marks are detected as by data_prep, unless the config states them.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from data_prep.sources.delimited import DelimitedFile
from data_prep.sources.input_files import FORMAT_OF_SUFFIX, format_suffix
from data_prep.sources.tables import NO_SEPARATOR, json_object
from data_prep.sources.text_lines import read_lines, utf8_problem
from eval.datasets.columns import TableColumns
from eval.datasets.file_dataset import FileDataset, MediaFile

TABLE_FORMATS = ("csv", "tsv", "jsonl")


def is_table(path: Path) -> bool:
    """Returns whether a path is a file whose extension is that of a table."""
    return FORMAT_OF_SUFFIX.get(format_suffix(path.name)) in TABLE_FORMATS and path.is_file()


def read_table(path: Path, columns: TableColumns) -> FileDataset:
    """Opens a table of media files; samples are ordered by each file's first row.

    Raises:
        InputError: if the table cannot be read or lacks a column, a row is malformed, or a file is
            missing.
    """
    files: dict[str, MediaFile] = {}
    for number, row in enumerate(_rows_of(path, columns), start=1):
        where = f"{path}: row {number}"
        media, key = _media_and_key(row, columns, where)
        known = files.setdefault(key, MediaFile(key, media, row | {"captions": []})).metadata
        for name in columns.captions:
            known["captions"] += _texts_of(row.get(name), f"{where}: {name}")
        if columns.class_name in row:
            known["class_name"] = _class_name_of(row[columns.class_name], where, columns)
        if columns.class_names in row:
            cell = row[columns.class_names]
            if isinstance(cell, str):
                cell = [name.strip() for name in cell.split(columns.class_separator)]
            known["class_names"] = _texts_of(cell, f"{where}: {columns.class_names}")
    _check_files(path, files)
    return FileDataset(path.parent, list(files.values()), location=path)


def _check_files(path: Path, files: dict[str, MediaFile]) -> None:
    missing = [file.path for file in files.values() if not _is_file(path.parent / file.path)]
    if missing:
        raise InputError(
            f"{path}: {len(missing)} of {len(files)} files are missing, the first: "
            f"{path.parent / missing[0]}; fetch them, or remove their rows"
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _rows_of(path: Path, columns: TableColumns) -> Iterator[dict[str, Any]]:
    """Yields the values of each row, by column.

    Raises:
        InputError: if the table cannot be read, or a row is malformed.
    """
    file_format = FORMAT_OF_SUFFIX[format_suffix(path.name)]
    if file_format == "jsonl":
        _check_settings(path, columns)
    rows = _json_rows(path) if file_format == "jsonl" else _rows(path, file_format, columns)
    for number, row in rows:
        if utf8_problem(row):
            found = ((name, utf8_problem({name: value})) for name, value in row.items())
            name, problem = next((name, problem) for name, problem in found if problem)
            raise InputError(
                f"{path}: line {number}: column {name!r}: expected text in UTF-8: {problem}"
            )
        yield row


def _check_settings(path: Path, columns: TableColumns) -> None:
    for name in ("quotes", "separator"):
        if getattr(columns, name) is not None:
            raise InputError(
                f"{path}: columns.{name} is for .csv and .tsv, found a table in .jsonl; set it "
                "to null"
            )


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(read_lines(str(path), newline="\n"), start=1):
        if line.strip():
            try:
                yield number, json_object(line)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}: line {number}: {error}") from None


def _rows(
    path: Path, file_format: str, columns: TableColumns
) -> Iterator[tuple[int, dict[str, str]]]:
    wanted = {*_fields_of(columns.media), *_fields_of(columns.key or "")}
    file = DelimitedFile(
        str(path),
        file_format=file_format,
        wanted=wanted,
        separator=columns.separator,
        quotes=columns.quotes,
        section="columns.",
    )
    header = file.header
    if len(header) == 1 and not wanted <= set(header):
        raise InputError(
            f"{path}: expected the columns {', '.join(sorted(wanted))} (columns.media), found "
            f"{header[0]!r}{NO_SEPARATOR.format('columns.')}"
        )
    if len(set(header)) != len(header):
        repeated = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}: duplicate column {repeated!r}; rename it")
    for fields in file.rows():
        if len(fields) != len(header):
            raise InputError(
                f"{path}: line {file.num_lines}: expected {len(header)} columns, found "
                f"{len(fields)}; a separator inside a field needs quotation marks around the field"
            )
        yield file.num_lines, dict(zip(header, fields, strict=True))


def _fields_of(template: str) -> list[str]:
    """Returns the names of the columns in braces; none if the template is malformed."""
    try:
        return [name for _, name, _, _ in string.Formatter().parse(template) if name]
    except ValueError:
        return []


def _media_and_key(row: dict[str, Any], columns: TableColumns, where: str) -> tuple[str, str]:
    """Fills the columns of a row into the templates of the path and the key."""
    try:
        media = columns.media.format_map(row)
        return media, media if columns.key is None else columns.key.format_map(row)
    except (KeyError, IndexError, ValueError, AttributeError, TypeError) as error:
        raise InputError(
            f"{where}: columns.media is {columns.media!r}, columns.key {columns.key!r}; found the "
            f"columns {sorted(row)} ({error})"
        ) from None


def _class_name_of(cell: Any, where: str, columns: TableColumns) -> str | None:
    names = _texts_of(cell, f"{where}: {columns.class_name}")
    if len(names) > 1:
        raise InputError(
            f"{where}: {columns.class_name}: expected one class, found {names}; for several, use "
            "the column columns.class_names"
        )
    return names[0] if names else None


def _texts_of(cell: Any, where: str) -> list[str]:
    """Returns the texts of a cell; numbers become text, and missing values are left out.

    Raises:
        InputError: if the cell is neither text nor number nor a list of them.
    """
    cells = cell if isinstance(cell, list) else [cell]
    for each in cells:
        if isinstance(each, dict | list):
            raise InputError(f"{where}: expected text or a list of texts, found {each!r:.80}")
    is_missing = (each is None or (isinstance(each, float) and math.isnan(each)) for each in cells)
    texts = [str(each) for each, missing in zip(cells, is_missing, strict=True) if not missing]
    return [text for text in texts if text]
