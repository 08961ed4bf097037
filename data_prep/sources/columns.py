"""What the columns of an Arrow table mean: pairs, or the bytes of media.

Parquet files and Hugging Face's Arrow files share this. Media stand in a column of text (paths or
URLs), of bytes, or in a struct {bytes, path}, which is how Hugging Face stores images and audio.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from data_prep.config import MakeShards
from data_prep.errors import InputError
from data_prep.sources.pair import BadItemError, Pair
from data_prep.sources.rows import check_columns, kept_json, pairs_of_row, wanted_columns

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 1024


class TableColumns:
    """The columns of one table that the config names.

    Args:
        config: columns and keep_columns.
        schema: of the table.
        path: where it is, for messages.

    Raises:
        InputError: a column is missing, or is of a type that cannot be used.
    """

    def __init__(self, config: MakeShards, schema: pyarrow.Schema, *, path: str):
        self.config = config
        self.path = path
        check_columns(path, schema.names, wanted=wanted_columns(config, with_kept=True))
        self.media_type = schema.field(config.columns.media).type
        self.holds_paths = _is_text(self.media_type)
        self.is_struct = _is_media_struct(self.media_type)
        if not (self.holds_paths or self.is_struct or _is_bytes(self.media_type)):
            raise InputError(
                f"{path}: column {config.columns.media!r} (columns.media): expected text (paths or "
                f"URLs), bytes, or a struct of bytes and path; found {self.media_type}"
            )
        for name in config.keep_columns:
            kind = schema.field(name).type
            if _is_bytes(kind) or _is_media_struct(kind):
                raise InputError(f"{path}: keep_columns: {name!r} holds bytes; leave it out")
        self._class_names = _class_names(schema)

    @property
    def others(self) -> list[str]:
        """The columns besides the media's that pairs are made of."""
        return [
            name
            for name in wanted_columns(self.config, with_kept=True)
            if name != self.config.columns.media
        ]

    @property
    def has_path(self) -> bool:
        """Whether the struct of the media has a path."""
        return self.is_struct and self.media_type.get_field_index("path") >= 0

    def values(self, batch: pyarrow.RecordBatch, name: str) -> list[Any]:
        """The values of one column; numbers that stand for classes become their names."""
        found = text_values(batch.column(name), name=name, path=self.path)
        names = self._class_names.get(name)
        if names is None:
            return found
        return [names[v] if isinstance(v, int) and 0 <= v < len(names) else None for v in found]

    def media_of_rows(
        self, column: pyarrow.Array | None, *, container: str, places: list[str]
    ) -> tuple[list[Any], list[str | None]]:
        """(path, URL or container; place in the container) of each row.

        Args:
            column: what was read of the media; None: nothing, as every row has its bytes inline;
                a struct may have come without its bytes, where no row has any.
            container: name of the file that holds the table.
            places: place in the container of each row.
        """
        name = self.config.columns.media
        if self.holds_paths:
            return text_values(column, name=name, path=self.path), [None] * len(places)
        if column is None or not self.has_path:
            return [container] * len(places), list(places)
        paths = text_values(part_of_struct(column, "path"), name=name, path=self.path)
        if column.type.get_field_index("bytes") < 0:
            return paths, [None] * len(places)
        is_inline = part_of_struct(column, "bytes").is_valid().to_pylist()
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
        """The pairs of a batch.

        Args:
            batch: with the columns `others`.
            first_row: number of its first row in the input.
            media: path, URL or container of each row.
            places: place in the container of each row.
        """
        columns, keep = self.config.columns, self.config.keep_columns
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


def media_bytes(column: pyarrow.Array, row: int, *, max_bytes: int) -> bytes:
    """The bytes in one row of a column of media.

    Raises:
        BadItemError: there are none, or too many.
    """
    if _is_media_struct(column.type):
        column = part_of_struct(column, "bytes")
    buffer = column[row].as_buffer()
    if buffer is None:
        raise BadItemError("missing_media_path", "neither bytes nor a path")
    if buffer.size > max_bytes:
        detail = f"{buffer.size:,} bytes; at most {max_bytes:,} are read"
        raise BadItemError("too_large", detail)
    return buffer.to_pybytes()


def part_of_struct(column: pyarrow.StructArray, name: str) -> pyarrow.Array:
    """One part of a struct; null where the whole struct is null."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(column, name)


def text_values(column: pyarrow.Array, *, name: str, path: str) -> list[Any]:
    """The values of a column; bytes that are not UTF-8 become lone surrogates.

    Raises:
        InputError: such bytes stand in lists.
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
    """Column -> names of its classes, of Hugging Face's ClassLabel features."""
    content = (schema.metadata or {}).get(b"huggingface")
    try:
        features = json.loads(content)["info"]["features"] if content else {}
        labels = {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):  # another program's metadata
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


def _is_media_struct(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if not types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        return False
    return _is_bytes(kind.field("bytes").type)
