"""Pairs and media from a folder written by Hugging Face's `Dataset.save_to_disk`.

The folder holds Arrow files (IPC streams), ordered by its state.json. Local files are
memory-mapped, so that only the accessed bytes are read. The place of a pair's bytes is
"<offset of its record batch in the file>:<row in the batch>".
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from data_prep.sources.columns import (
    ROWS_AT_ONCE,
    SampleTable,
    TableColumns,
    media_bytes,
)
from data_prep.sources.input_files import InputFiles, PairSource, readable_input
from data_prep.sources.pair import Pair
from data_prep.storage import remote_file

if TYPE_CHECKING:
    import pyarrow

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


def read_huggingface(source: PairSource) -> Iterator[Pair]:
    """Yields the pairs of a dataset written by Hugging Face's `save_to_disk`.

    Raises:
        InputError: if the folder holds several splits or an indices mapping, or a file is damaged.
    """
    files = arrow_files(source.input)
    first_row = 1
    for name in files.names:
        for offset, batch in _record_batches(files.path_of(name)):
            if source.media is None:
                path = files.path_of(name)
                table = SampleTable(source, batch.schema, path=path, name=name)
                places = [f"{offset}:{row}" for row in range(batch.num_rows)]
                yield from table.pairs(batch, first_row=first_row, places=places)
                first_row += batch.num_rows
                continue
            columns = TableColumns(
                source.columns, source.keep_columns, batch.schema, path=files.path_of(name)
            )
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                part = batch.slice(start, ROWS_AT_ONCE)
                rows = [f"{offset}:{start + i}" for i in range(part.num_rows)]
                column = part.column(source.columns.media)
                media, places = columns.media_of_rows(column, container=name, places=rows)
                yield from columns.pairs(part, first_row=first_row, media=media, places=places)
                first_row += part.num_rows


def arrow_files(folder: str) -> InputFiles:
    """Lists the Arrow files of a dataset folder, in the dataset's order.

    Raises:
        InputError: in the same cases as `read_huggingface`.
    """
    splits = _read_json(folder, "dataset_dict.json")
    if splits is not None:
        found = ", ".join(map(str, splits.get("splits", [])))
        raise InputError(
            f"{folder}: expected one split of a Hugging Face dataset, found a folder of several "
            f"splits: {found}; append the name of one split to input"
        )
    state = _read_json(folder, "state.json")
    if state is None:
        raise InputError(
            f"{folder}: expected a folder written by Hugging Face's save_to_disk, found no "
            "state.json"
        )
    if any(state.get(key) for key in ("_indices_data_files", "_indices_files")):
        raise InputError(
            f"{folder}: state.json has an indices mapping, which old versions of the datasets "
            "library wrote after select or shuffle; load the dataset and save it again: "
            "datasets.load_from_disk(old).flatten_indices().save_to_disk(new)"
        )
    try:
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder}: damaged state.json: {error!r}") from None
    return InputFiles(folder, names)


def _read_json(folder: str, name: str) -> dict[str, Any] | None:
    path = remote_file.join(folder, name)
    with readable_input(path):
        if not remote_file.exists(path):
            return None
        content = remote_file.read_bytes(path)
    try:
        values = json.loads(content)
        if not isinstance(values, dict):
            raise ValueError(f"expected an object, found {type(values).__name__}")
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}") from None
    return values


# -------------------------------------------------------------------------------- record batches


@contextmanager
def _open_arrow(path: str) -> Iterator[Any]:
    import pyarrow

    local = remote_file.local_path(path)
    try:
        with closing(
            pyarrow.memory_map(str(local))
            if local is not None
            else pyarrow.PythonFile(remote_file.open_binary(path), mode="r")
        ) as file:
            yield file
    except (pyarrow.ArrowException, EOFError, OSError) as error:
        raise InputError(f"{path}: expected a readable Arrow stream: {error}") from None


def _record_batches(path: str) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Yields (offset, batch) of a stream, and fails if the stream is truncated."""
    import pyarrow

    with _open_arrow(path) as file:
        schema = pyarrow.ipc.read_schema(pyarrow.ipc.read_message(file))
        while True:
            offset = file.tell()
            if file.read(len(END_OF_STREAM)) in (END_OF_STREAM, END_OF_STREAM[4:]):
                return
            file.seek(offset)
            yield offset, _read_batch(file, schema)


def _read_batch(file: Any, schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    import pyarrow

    message = pyarrow.ipc.read_message(file)
    if message.type != "record batch":
        raise pyarrow.ArrowInvalid(f"expected a record batch, found a {message.type}")
    batch = pyarrow.ipc.read_record_batch(message, schema)
    batch.validate()
    return batch


class ArrowMedia:
    """The media in one Arrow file.

    Args:
        path: path or URL of the file.
        column: name of the media column.
        max_bytes: media above this limit are rejected without being read.
    """

    def __init__(self, path: str, *, column: str, max_bytes: int):
        import pyarrow

        self.path = path
        self.column = column
        self.max_bytes = max_bytes
        self._opened = _open_arrow(path)
        self._file = self._opened.__enter__()
        self._schema = pyarrow.ipc.read_schema(pyarrow.ipc.read_message(self._file))
        self._offset = -1
        self._batch: pyarrow.RecordBatch | None = None

    def read(self, place: str) -> bytes:
        """Reads the bytes at a place.

        Raises:
            BadItemError: if there are no bytes, or more than `max_bytes`.
            InputError: if the file is unreadable, or has changed.
        """
        import pyarrow

        offset, row = map(int, place.split(":"))
        try:
            if offset != self._offset:
                self._file.seek(offset)
                self._batch, self._offset = _read_batch(self._file, self._schema), offset
            column = self._batch.column(self.column)
            return media_bytes(column, row, max_bytes=self.max_bytes)
        except (pyarrow.ArrowException, EOFError, OSError, IndexError) as error:
            raise InputError(f"{self.path}: unreadable at {place}: {error}") from None

    def close(self) -> None:
        """Closes the file."""
        self._opened.__exit__(None, None, None)
