"""Pairs and media bytes from the columns of an Arrow table.

Parquet files and Hugging Face's Arrow files share this code. The media column holds text (paths or
URLs), bytes, or a struct {bytes, path}, as Hugging Face stores images and audio.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.modalities.vectors import VectorError, to_npy, to_vector
from data_prep.sources.input_files import PairSource
from data_prep.sources.pair import BadItemError, FileRef, Pair
from data_prep.sources.rows import check_columns, kept_json, pairs_of_row, wanted_columns
from data_prep.sources.sample_rows import sample_rows

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 1024


class TableColumns:
    """The configured columns of one table.

    Args:
        columns: column name of each role.
        keep_columns: names of additional columns to keep.
        schema: schema of the table.
        path: path of the table, for messages.

    Raises:
        InputError: if a column is missing, or has an unsupported type.
    """

    def __init__(
        self,
        columns: Columns,
        keep_columns: tuple[str, ...],
        schema: pyarrow.Schema,
        *,
        path: str,
    ):
        self.columns = columns
        self.keep_columns = keep_columns
        self.media_name = columns.media
        self.path = path
        self._wanted = wanted_columns(columns, keep_columns)
        check_columns(path, schema.names, wanted=self._wanted)
        self.media_type = schema.field(columns.media).type
        self.holds_paths = _is_text(self.media_type)
        self.is_struct = _is_media_struct(self.media_type)
        if not (self.holds_paths or self.is_struct or _is_bytes(self.media_type)):
            raise InputError(
                f"{path}: column {columns.media!r} (columns.media): expected text (paths or "
                f"URLs), bytes, or a struct of bytes and path; found {self.media_type}"
            )
        for name in keep_columns:
            kind = schema.field(name).type
            if _is_bytes(kind) or _is_media_struct(kind):
                raise InputError(f"{path}: keep_columns: {name!r} contains bytes; remove it")
        self._class_names = _class_names(schema)

    @property
    def others(self) -> list[str]:
        """Names of all required columns except the media column."""
        return [name for name in self._wanted if name != self.media_name]

    @property
    def has_path(self) -> bool:
        """Whether the media column is a struct that has a path."""
        return self.is_struct and self.media_type.get_field_index("path") >= 0

    def values(self, batch: pyarrow.RecordBatch, name: str) -> list[Any]:
        """Returns the values of one column, with class numbers replaced by class names."""
        found = text_values(batch.column(name), name=name, path=self.path)
        return _with_class_names(found, self._class_names.get(name))

    def media_of_rows(
        self, column: pyarrow.Array | None, *, container: str, places: list[str]
    ) -> tuple[list[Any], list[str | None]]:
        """Locates the media of each row.

        Args:
            column: media column as read. None if it was not read because every row has inline
                bytes; a struct without the field `bytes` if no row has inline bytes.
            container: name of the file that holds the table.
            places: place of each row in the container.

        Returns:
            Two lists with an element per row: the path, URL or container, and the place in the
            container (None for a path or URL).
        """
        name = self.media_name
        if self.holds_paths:
            return text_values(column, name=name, path=self.path), [None] * len(places)
        if column is None or not self.has_path:
            return [container] * len(places), list(places)
        paths = text_values(struct_field(column, "path"), name=name, path=self.path)
        if column.type.get_field_index("bytes") < 0:
            return paths, [None] * len(places)
        is_inline = struct_field(column, "bytes").is_valid().to_pylist()
        choices = zip(is_inline, paths, places, strict=True)
        found = [(container, place) if inline else (path, None) for inline, path, place in choices]
        return [media for media, _ in found], [place for _, place in found]

    def pairs(
        self,
        batch: pyarrow.RecordBatch,
        *,
        first_row: int,
        media: list[Any],
        places: list[str | None],
    ) -> Iterator[Pair]:
        """Yields the pairs of a batch.

        Args:
            batch: rows with the columns `others`.
            first_row: number of the first row in the input.
            media: path, URL or container of each row.
            places: place of each row in the container.
        """
        columns, keep = self.columns, self.keep_columns
        values = {name: self.values(batch, name) for name in self.others}
        nothing = [None] * len(media)
        for i in range(len(media)):
            yield from pairs_of_row(
                row=first_row + i,
                media=media[i],
                place=places[i],
                captions=values[columns.caption][i],
                class_name=values.get(columns.class_name, nothing)[i],
                uid=values.get(columns.uid, nothing)[i],
                kept=kept_json({name: values[name][i] for name in keep}, keep),
            )


class SampleTable:
    """The columns of one table whose rows are samples of modalities.

    Args:
        source: input and its settings.
        schema: schema of the table.
        path: path of the table, for messages.
        name: name of the table, relative to the input's folder; the container of inline bytes.

    Raises:
        InputError: if a column is missing, or has an unsupported type.
    """

    def __init__(self, source: PairSource, schema: pyarrow.Schema, *, path: str, name: str):
        self.path, self.container = path, name
        self.wanted = list(wanted_columns(source.columns, source.keep_columns))
        check_columns(
            path, schema.names, wanted=wanted_columns(source.columns, source.keep_columns)
        )
        self.rows = sample_rows(source, name)
        self.types = {column: schema.field(column).type for column in self.wanted}
        self._class_names = _class_names(schema)
        self.inline: set[str] = set()  # columns of bytes, or of lists of numbers
        for modality, each in self.rows.columns.items():
            for column in (each.column,) if isinstance(each.column, str) else each.column:
                self._check_type(modality, each.kind, column)
        for column in self.wanted:
            kind = self.types[column]
            if column not in self.inline and (_is_bytes(kind) or _is_media_struct(kind)):
                raise InputError(f"{path}: column {column!r} contains bytes; expected values")

    def _check_type(self, modality: str, kind: str, column: str) -> None:
        found = self.types[column]
        holds_bytes = _is_bytes(found) or _is_media_struct(found)
        is_usable = {
            "image": holds_bytes or _is_text(found),
            "audio": holds_bytes or _is_text(found),
            "vector": holds_bytes or _is_text(found) or _is_number(found) or _is_list(found),
            "text": not holds_bytes,
        }[kind]
        if not is_usable:
            expected = "text (paths or URLs), bytes, or a struct of bytes and path"
            if kind == "text":
                expected = "text or lists of text"
            if kind == "vector":
                expected += ", numbers, or lists of numbers"
            raise InputError(
                f"{self.path}: column {column!r} of {modality}: expected {expected}; found {found}"
            )
        if holds_bytes or (kind == "vector" and _is_list(found)):
            self.inline.add(column)

    def pairs(
        self,
        batch: pyarrow.RecordBatch,
        *,
        first_row: int,
        places: list[str],
        complete: Collection[str] = (),
    ) -> Iterator[Pair]:
        """Yields the pairs of a batch.

        Args:
            batch: rows with the wanted columns, except `complete`.
            first_row: number of the first row in the input.
            places: place of each row in the table.
            complete: inline columns without missing values.
        """
        cells = {}
        for column in self.wanted:
            if column in complete:
                cells[column] = [FileRef(self.container, place, column) for place in places]
            elif column in self.inline:
                cells[column] = self._inline_cells(batch.column(column), column, places)
            else:
                found = text_values(batch.column(column), name=column, path=self.path)
                cells[column] = _with_class_names(found, self._class_names.get(column))
        for i in range(len(places)):
            values = {column: found[i] for column, found in cells.items()}
            yield self.rows.pair(first_row + i, values.get)

    def _inline_cells(self, found: pyarrow.Array, column: str, places: list[str]) -> list[Any]:
        paths: list[Any] = [None] * len(places)
        if _is_media_struct(found.type):
            if found.type.get_field_index("path") >= 0:
                paths = text_values(struct_field(found, "path"), name=column, path=self.path)
            found = struct_field(found, "bytes")
        rows = zip(found.is_valid().to_pylist(), paths, places, strict=True)
        return [FileRef(self.container, place, column) if ok else path for ok, path, place in rows]


def _with_class_names(values: list[Any], names: list[str] | None) -> list[Any]:
    """Replaces class numbers by class names, if the column has any."""
    if names is None:
        return values
    return [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in values]


def media_bytes(column: pyarrow.Array, row: int, *, max_bytes: int) -> bytes:
    """Returns the bytes in one row of a media column; numbers of a list as an `.npy` file.

    Raises:
        BadItemError: if there are no bytes, or more than `max_bytes`.
    """
    if _is_list(column.type):
        return _list_bytes(column[row].as_py())
    if _is_media_struct(column.type):
        column = struct_field(column, "bytes")
    buffer = column[row].as_buffer()
    if buffer is None:
        raise BadItemError("missing_media_path", "neither bytes nor a path")
    if buffer.size > max_bytes:
        detail = f"{buffer.size:,} bytes; expected at most {max_bytes:,}"
        raise BadItemError("too_large", detail)
    return buffer.to_pybytes()


def _list_bytes(numbers: Any) -> bytes:
    try:
        return to_npy(to_vector(numbers))
    except VectorError as error:
        raise BadItemError(error.reason, str(error)) from None


def struct_field(column: pyarrow.StructArray, name: str) -> pyarrow.Array:
    """Extracts one field of a struct; null where the whole struct is null."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(column, name)


def text_values(column: pyarrow.Array, *, name: str, path: str) -> list[Any]:
    """Returns the values of a column; bytes that are not UTF-8 become lone surrogates.

    Raises:
        InputError: if bytes in a column of lists are not UTF-8.
    """
    import pyarrow

    try:
        return column.to_pylist()
    except UnicodeDecodeError as error:
        if not _is_text(column.type):
            raise InputError(f"{path}: column {name!r}: expected UTF-8: {error}") from None
    contents = column.cast(pyarrow.large_binary()).to_pylist()
    decoded = (c if c is None else c.decode("utf-8", errors="surrogateescape") for c in contents)
    return list(decoded)


def _class_names(schema: pyarrow.Schema) -> dict[str, list[str]]:
    """Returns column -> class names, from Hugging Face's ClassLabel features."""
    content = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(content)["info"]["features"] if content else {}
        labels = {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # metadata of another program
        return {}
    return {name: names for name, names in labels.items() if isinstance(names, list)}


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    tests: list[Callable[[Any], bool]] = [
        types.is_binary,
        types.is_large_binary,
        types.is_binary_view,
        types.is_fixed_size_binary,
    ]
    return any(test(kind) for test in tests)


def _is_number(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind)


def _is_list(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if isinstance(kind, types.lib.BaseExtensionType):
        return _is_list(kind.storage_type)
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _is_media_struct(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return _is_bytes(kind.field("bytes").type)
