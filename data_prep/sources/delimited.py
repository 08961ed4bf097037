"""Rows of CSV and TSV files, whose separator and quotation marks are detected.

header line -> separator -> quoted or plain -> rows of fields
"""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass

from data_prep.errors import InputError
from data_prep.sources.text_lines import MAX_LINE_CHARACTERS, read_lines

log = logging.getLogger(__name__)

SEPARATORS = {"csv": ",", "tsv": "\t"}
OTHER_SEPARATORS = (",", "\t", ";", "|")
NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "vertical bars"}
# Text read to detect quotation marks, in characters
MAX_CHARACTERS_EXAMINED = 1 << 24
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|NA")


@dataclass(frozen=True)
class TableLayout:
    """How the fields of a CSV or TSV file are separated and quoted."""

    separator: str
    has_quotes: bool


class DelimitedFile:
    """A CSV or TSV file with a header.

    Args:
        path: path or URL.
        file_format: "csv" or "tsv".
        wanted: names of columns that the file must have; they identify the separator.
        separator: separator of columns; None to detect it.
        quotes: whether fields may be quoted; None: yes in CSV files, detected in TSV files.
        section: config section of these settings in messages, such as "columns.".

    Raises:
        InputError: if the file is unreadable.
    """

    def __init__(
        self,
        path: str,
        *,
        file_format: str,
        wanted: Collection[str],
        separator: str | None = None,
        quotes: bool | None = None,
        section: str = "",
    ):
        self.path = path
        self.section = section
        self.layout = detect_layout(
            path,
            file_format=file_format,
            wanted=wanted,
            separator=separator,
            quotes=quotes,
            section=section,
        )
        self.num_lines = 0  # read so far
        self._rows = self._quoted_rows() if self.layout.has_quotes else self._plain_rows()
        self.header = [name.strip() for name in next(self._rows, [])]

    def rows(self) -> Iterator[list[str]]:
        """Yields the fields of each row after the header; `num_lines` is the row's last line.

        Raises:
            InputError: if the file is unreadable, or has unbalanced quotation marks.
        """
        return self._rows

    def _plain_rows(self) -> Iterator[list[str]]:
        for line in read_lines(self.path, newline="\n"):
            self.num_lines += 1
            if line.strip():
                yield line.rstrip("\r\n").split(self.layout.separator)

    def _quoted_rows(self) -> Iterator[list[str]]:
        reader = _csv_reader(read_lines(self.path, newline=""), self.layout.separator)
        try:
            for fields in reader:
                self.num_lines = reader.line_num
                if fields:
                    yield fields
        except csv.Error as error:
            raise InputError(
                f"{self.path}: line {reader.line_num}: {error}; if quotation marks in the "
                f"captions are plain text, set {self.section}quotes=false"
            ) from None


def detect_layout(
    path: str,
    *,
    file_format: str,
    wanted: Collection[str],
    separator: str | None,
    quotes: bool | None,
    section: str,
) -> TableLayout:
    """Detects the layout of a file, and logs it if it is not the usual one of the format.

    The separator is the one that yields all wanted columns. If none does, it is the one that yields
    most columns, so that a message can name them.

    Args:
        path: path or URL.
        file_format: "csv" or "tsv".
        wanted: names of columns that the file must have.
        separator: separator of columns; None to detect it.
        quotes: whether fields may be quoted; None: yes in CSV files, detected in TSV files.
        section: config section of these settings in messages, such as "columns.".

    Raises:
        InputError: if the file is unreadable.
    """
    usual = SEPARATORS[file_format]
    if separator is None:
        header = next((line for line in read_lines(path, newline="") if line.strip()), "")
        separator = _detect_separator(header, wanted, usual=usual, has_quotes=quotes is not False)
        if separator != usual:
            log.warning("%s: columns are separated by %s", path, NAMES[separator])
    if quotes is None:
        quotes = file_format == "csv" or _has_quoted_fields(read_lines(path, newline=""), separator)
        if quotes and file_format == "tsv":
            log.warning(
                "%s: fields are quoted, and their quotation marks are removed; if they are plain "
                "text, set %squotes=false",
                path,
                section,
            )
    return TableLayout(separator, quotes)


def _detect_separator(header: str, wanted: Collection[str], *, usual: str, has_quotes: bool) -> str:
    found = {}
    for separator in (usual, *OTHER_SEPARATORS):
        try:
            names = next(_csv_reader([header], separator)) if has_quotes else None
        except csv.Error:  # a header of several lines, or plain quotation marks
            names = None
        names = names or header.rstrip("\r\n").split(separator)
        found[separator] = {name.strip() for name in names}
        if found[separator] >= set(wanted):
            return separator
    return max(found, key=lambda separator: len(found[separator]))


def _csv_reader(lines: Iterable[str], separator: str) -> Iterator[list[str]]:
    csv.field_size_limit(MAX_LINE_CHARACTERS)  # the csv module's default is 131,072
    return csv.reader(lines, delimiter=separator, strict=True)


# ---------------------------------------------------------------------------- quotation marks


# Rules by which programs quote a field; all double the quotation marks inside.
QUOTING_RULES: dict[str, Callable[[str, str], bool]] = {
    "minimal": lambda field, separator: any(c in field for c in (separator, '"', "\n", "\r")),
    "excel": lambda field, separator: any(c in field for c in (separator, '"', "\n", "\r", ",")),
    "all": lambda _field, _separator: True,
    "text": lambda field, _separator: NUMBER.fullmatch(field) is None,
}


def _has_quoted_fields(lines: Iterable[str], separator: str) -> bool:
    """Returns whether a program quoted the fields that need it.

    True if every row with a quotation mark is what a quoting rule writes for its fields. Captions
    with plain quotation marks break every rule, because they are neither enclosed nor doubled.
    """
    row, rules, has_marks = [], dict(QUOTING_RULES), False
    try:
        for fields in _csv_reader(_recorded(lines, row), separator):
            text = "".join(row).rstrip("\r\n")
            row.clear()
            if not fields or (list(rules) == ["minimal"] and '"' not in text):
                continue
            has_marks = has_marks or '"' in text
            rules = {
                name: must_quote
                for name, must_quote in rules.items()
                if _written(fields, separator, must_quote) == text
            }
            if not rules:
                return False
    except csv.Error:
        return False
    except _EnoughError:
        pass
    return has_marks


class _EnoughError(Exception):
    """Raised when enough text was examined."""


def _recorded(lines: Iterable[str], row: list[str]) -> Iterator[str]:
    """Yields the lines, and appends each to `row`."""
    num_characters = 0
    for line in lines:
        num_characters += len(line)
        if num_characters > MAX_CHARACTERS_EXAMINED:
            raise _EnoughError
        row.append(line)
        yield line


def _written(fields: list[str], separator: str, must_quote: Callable[[str, str], bool]) -> str:
    return separator.join(
        '"' + field.replace('"', '""') + '"' if must_quote(field, separator) else field
        for field in fields
    )
