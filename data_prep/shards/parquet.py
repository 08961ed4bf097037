"""The Parquet beside a shard, for tars that others made and for repairs: rows from the samples.

make_shards knows more about its samples than the tar does, and writes its rows itself.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import AudioOptions, ImageOptions
from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.media.preparation import prepare_media
from data_prep.shards.columns import KeptType, kept_value, own_columns, shard_schema
from data_prep.shards.sample import (
    Sample,
    captions_of,
    media_extension_of,
    metadata_of,
)
from data_prep.storage.atomic import write_atomically

if TYPE_CHECKING:
    import pyarrow


def measure_media(sample: Sample, media_kind: str) -> dict[str, Any]:
    """The columns shard_columns.MEASURES of a sample's picture or clip, which stays as it is.

    Raises:
        MediaError: it cannot be decoded, or is beyond the limits of the default settings.
    """
    prepared = prepare_media(
        sample.members[media_extension(sample, media_kind)],
        kind=media_kind,
        image=ImageOptions(reencode="never"),
        audio=AudioOptions(reencode="never"),
    )
    return prepared[0].measures


def media_extension(sample: Sample, media_kind: str) -> str:
    """The member that is of the dataset's kind, which is there."""
    extension = media_extension_of(sample.members, media_kind)
    assert extension is not None, f"{sample}: no {media_kind}"
    return extension


def row_of(
    sample: Sample,
    *,
    media_kind: str,
    measures: Mapping[str, Any],
    kept: Mapping[str, KeptType],
    source: str | None = None,
    source_row: int | None = None,
) -> dict[str, Any]:
    """What a sample's members say about it, as a row of the shard's Parquet.

    Args:
        sample: with all its members.
        media_kind: "image" or "audio".
        measures: of measure_media; empty where the media cannot be measured.
        kept: type of each key of the .json to keep.
        source, source_row: tar and place in it from 1; None where the sample is from elsewhere.
    """
    metadata = metadata_of(sample)
    extension = media_extension(sample, media_kind)
    content = sample.members[extension]
    class_name, uid = metadata.get("class_name"), metadata.get("uid")
    return {
        "key": sample.key,
        "uid": sample.key if uid is None else str(uid),
        "captions": captions_of(sample),
        "class_name": None if class_name is None else str(class_name),
        "marks": [],
        "extension": extension,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **measures,
        "source": source,
        "source_row": source_row,
        **{name: kept_value(metadata.get(name), kind) for name, kind in kept.items()},
    }


def write_shard_parquet(path: Path, table: pyarrow.Table) -> None:
    """Writes a shard's Parquet, whole or not at all."""
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, sink.getvalue())


def read_shard_parquet(path: Path, *, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """
    Raises:
        InputError: the file is missing, or is no Parquet, or is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=columns)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged Parquet: {error}") from None


def kept_types_of(schema: pyarrow.Schema, media_kind: str) -> dict[str, KeptType]:
    """The columns of a dataset's Parquet that a user kept."""
    ours = own_columns(media_kind)
    return {field.name: str(field.type) for field in schema if field.name not in ours}


class RowMender:
    """Rows for the samples that a tar has now: the old ones where they fit, others measured anew.

    Args:
        old: the shard's Parquet as it was; None if it cannot be read.
        media_kind: "image" or "audio".
        kept: type of each column that the user keeps, for when `old` is None.
    """

    def __init__(
        self, old: pyarrow.Table | None, *, media_kind: str, kept: Mapping[str, KeptType]
    ) -> None:
        self.media_kind = media_kind
        self.kept = kept if old is None else kept_types_of(old.schema, media_kind)
        self.rows: list[dict[str, Any]] = []
        self.num_measured = 0
        self._old = {} if old is None else {row["key"]: row for row in old.to_pylist()}

    def add(self, sample: Sample) -> None:
        """Appends the row of the next sample of the tar."""
        content = sample.members[media_extension(sample, self.media_kind)]
        row = self._old.get(sample.key)
        if row is None or row["sha256"] != hashlib.sha256(content).hexdigest():
            row = self._measure(sample)
            self.num_measured += 1
        self.rows.append(row)

    def _measure(self, sample: Sample) -> dict[str, Any]:
        try:
            measures = measure_media(sample, self.media_kind)
        except MediaError:  # the sample is in the tar and stays there; verify with decode names it
            measures = {}
        return row_of(sample, media_kind=self.media_kind, measures=measures, kept=self.kept)

    def count_marks(self) -> dict[str, int]:
        """How many rows carry each mark."""
        return dict(Counter(mark for row in self.rows for mark in row["marks"] or ()))

    def to_table(self) -> pyarrow.Table:
        """The rows, with the columns of the dataset's other shards."""
        import pyarrow

        schema = shard_schema(self.media_kind, kept=self.kept)
        return pyarrow.Table.from_pylist(self.rows, schema=schema)
