"""Pairs and media from Parquet files.

The scan never reads inline bytes: the statistics of a row group show whether it contains any. The
place of a pair's bytes is its row number in the file.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from data_prep.sources.columns import (
    ROWS_AT_ONCE,
    SampleTable,
    TableColumns,
    media_bytes,
)
from data_prep.sources.input_files import PairSource, files_of_input
from data_prep.sources.pair import Pair
from data_prep.sources.rows import resolve_media_paths
from data_prep.storage import remote_file

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

BUFFER_BYTES = 1 << 20  # read-ahead per column
BATCH_BYTES = 1 << 23  # bytes of media in memory at a time


def read_parquet(source: PairSource) -> Iterator[Pair]:
    """Yields the pairs of Parquet files, in order.

    Raises:
        InputError: if a file is unreadable, or lacks a column.
    """
    files = files_of_input(source.input, "parquet")
    first_row = 0
    for name in files.names:
        path = files.path_of(name)
        with open_parquet(path) as file:
            if source.media is None:
                table = SampleTable(source, file.schema_arrow, path=path, name=name)
                yield from _samples_of_file(file, table, first_row=first_row)
            else:
                columns = TableColumns(
                    source.columns, source.keep_columns, file.schema_arrow, path=path
                )
                pairs = _pairs_of_file(file, columns, container=name, first_row=first_row)
                yield from resolve_media_paths(pairs, name, media_root=source.media_root)
            first_row += file.metadata.num_rows


@contextmanager
def open_parquet(path: str) -> Iterator[pyarrow.parquet.ParquetFile]:
    """Opens a Parquet file without prefetching any data.

    Raises:
        InputError: if the file is unreadable, or is not a Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    local = remote_file.local_path(path)
    try:
        source = str(local) if local is not None else remote_file.open_binary(path)
        with pyarrow.parquet.ParquetFile(
            source, pre_buffer=False, buffer_size=BUFFER_BYTES
        ) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: expected a readable Parquet file: {error}") from None


def _pairs_of_file(
    file: pyarrow.parquet.ParquetFile, columns: TableColumns, *, container: str, first_row: int
) -> Iterator[Pair]:
    start = 0
    for group in range(file.num_row_groups):
        media_column = _media_column(columns, file.metadata.row_group(group))
        wanted = [*columns.others, *([media_column] if media_column else [])]
        for batch in file.iter_batches(
            ROWS_AT_ONCE, row_groups=[group], columns=wanted, use_threads=False
        ):
            column = batch.column(columns.media_name) if media_column else None
            rows = [str(start + i) for i in range(batch.num_rows)]
            media, places = columns.media_of_rows(column, container=container, places=rows)
            yield from columns.pairs(
                batch, first_row=first_row + start + 1, media=media, places=places
            )
            start += batch.num_rows


def _samples_of_file(
    file: pyarrow.parquet.ParquetFile, table: SampleTable, *, first_row: int
) -> Iterator[Pair]:
    start = 0
    for group in range(file.num_row_groups):
        metadata = file.metadata.row_group(group)
        complete = {column for column in table.inline if _has_all_bytes(metadata, column)}
        # At least one column is read, so that the rows are counted.
        wanted = [column for column in table.wanted if column not in complete] or table.wanted
        for batch in file.iter_batches(
            ROWS_AT_ONCE, row_groups=[group], columns=wanted, use_threads=False
        ):
            places = [str(start + i) for i in range(batch.num_rows)]
            yield from table.pairs(
                batch, first_row=first_row + start + 1, places=places, complete=complete
            )
            start += batch.num_rows


def _has_all_bytes(group: Any, column: str) -> bool:
    """Returns whether the statistics of a row group show inline bytes in every row."""
    parts = [group.column(number) for number in range(group.num_columns)]
    names = (column, f"{column}.bytes")
    part = next((part for part in parts if part.path_in_schema in names), None)
    statistics = part.statistics if part else None
    return bool(statistics and statistics.has_null_count and statistics.null_count == 0)


def _media_column(columns: TableColumns, group: Any) -> str | None:
    """Returns the field of the media column to read in one row group.

    None if every row has inline bytes.
    """
    column = columns.media_name
    if columns.holds_paths:
        return column
    if not columns.has_path:
        return None
    parts = [group.column(number) for number in range(group.num_columns)]
    part = next(part for part in parts if part.path_in_schema == f"{column}.bytes")
    statistics = part.statistics
    num_nulls = statistics.null_count if statistics and statistics.has_null_count else None
    if num_nulls == 0:
        return None
    return f"{column}.path" if num_nulls == group.num_rows else column


class ParquetMedia:
    """The media in one Parquet file, read in row order.

    Args:
        path: path or URL of the file.
        column: name of the media column.
        max_bytes: media above this limit are rejected without being read.
    """

    def __init__(self, path: str, *, column: str, max_bytes: int):
        self.path = path
        self.column = column
        self.max_bytes = max_bytes
        self._opened = open_parquet(path)
        self._file = self._opened.__enter__()
        groups = (self._file.metadata.row_group(n) for n in range(self._file.num_row_groups))
        # end row of each row group (exclusive)
        self._ends = list(accumulate(group.num_rows for group in groups))
        self._batches: Iterator[pyarrow.RecordBatch] = iter(())
        self._batch: pyarrow.RecordBatch | None = None
        self._start = 0  # index in the file of the batch's first row

    def read(self, place: str) -> bytes:
        """Reads the bytes in a row.

        Raises:
            BadItemError: if there are no bytes, or more than `max_bytes`.
            InputError: if the file is unreadable, or has changed.
        """
        import pyarrow

        row = int(place)
        try:
            self._go_to(row)
        except (pyarrow.ArrowException, OSError) as error:
            raise InputError(f"{self.path}: row {row}: unreadable: {error}") from None
        column = self._batch.column(self.column)
        return media_bytes(column, row - self._start, max_bytes=self.max_bytes)

    def _go_to(self, row: int) -> None:
        group = bisect_right(self._ends, row)
        if group == len(self._ends):
            raise InputError(f"{self.path}: expected a row {row}; the file has changed")
        group_start = self._ends[group - 1] if group else 0
        if self._batch is None or not self._start <= row or self._start < group_start:
            self._batches = self._batches_of(group)
            self._start, self._batch = group_start, next(self._batches)
        while row >= self._start + self._batch.num_rows:
            self._start += self._batch.num_rows
            self._batch = next(self._batches)

    def _batches_of(self, group: int) -> Iterator[pyarrow.RecordBatch]:
        metadata = self._file.metadata.row_group(group)
        parts = [metadata.column(n) for n in range(metadata.num_columns)]
        num_bytes = sum(
            part.total_uncompressed_size
            for part in parts
            if part.path_in_schema.split(".")[0] == self.column
        )
        rows = BATCH_BYTES * metadata.num_rows // max(num_bytes, 1)
        return self._file.iter_batches(
            min(max(rows, 1), ROWS_AT_ONCE),
            row_groups=[group],
            columns=[self.column],
            use_threads=False,
        )

    def close(self) -> None:
        """Closes the file."""
        self._opened.__exit__(None, None, None)
