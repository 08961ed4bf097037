"""Parquet file of a shard, built from the samples of its tar.

Used by index_shards and by repairs; make_shards writes additional columns from its input.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from data_prep.config import AudioOptions, ImageOptions
from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.media.preparation import prepare_media
from data_prep.modalities.modality import Modalities, file_extension
from data_prep.shards.columns import KeptType, built_in_columns, kept_value, schema_of
from data_prep.shards.index import REPAIR_ADVICE
from data_prep.shards.manifest import ManifestRow
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    caption_tags,
    captions_of,
    media_extension_of,
    metadata_of,
)
from data_prep.shards.sample_contents import SampleContents, contents_of
from data_prep.storage.atomic import sha256_of, write_atomically

if TYPE_CHECKING:
    import pyarrow


def measure_media(sample: Sample, media_kind: str) -> dict[str, Any]:
    """Computes the columns `MEASURES` of a sample's image or audio without re-encoding it.

    Raises:
        MediaError: if the media cannot be decoded, or exceeds the limits of the default settings.
    """
    return _measures(sample.members[media_extension(sample, media_kind)], media_kind)


def _measures(content: bytes, kind: str) -> dict[str, Any]:
    prepared = prepare_media(
        content,
        kind=kind,
        image=ImageOptions(reencode="never"),
        audio=AudioOptions(reencode="never"),
    )
    return prepared[0].measures


def media_extension(sample: Sample, media_kind: str) -> str:
    """Returns the extension of the media member, which must exist."""
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
    """Builds the Parquet row of a sample from its members.

    Args:
        sample: sample with all its members.
        media_kind: "image" or "audio".
        measures: result of `measure_media`; empty if the media cannot be decoded.
        kept: type of each kept key of the .json member.
        source: name of the tar; None if unknown.
        source_row: number of the sample in the tar, from 1; None if unknown.
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
        "marks": caption_tags(sample),
        "extension": extension,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **measures,
        "source": source,
        "source_row": source_row,
        **{name: kept_value(metadata.get(name), kind) for name, kind in kept.items()},
    }


def row_of_contents(
    contents: SampleContents,
    modalities: Modalities,
    *,
    measures: Mapping[str, Any],
    sources: Mapping[str, str] = MappingProxyType({}),
    members: Mapping[str, bytes],
) -> dict[str, Any]:
    """Builds the columns of the modalities of a sample, which is not of a pair dataset.

    Args:
        contents: the sample, sorted by modality.
        modalities: modalities of the dataset.
        measures: columns of images, clips and vectors, with the prefix of their modality.
        sources: modality -> path or URL as given in the input.
        members: extension -> bytes.
    """
    row: dict[str, Any] = {"key": contents.key}
    for name, modality in modalities.items():
        row[f"has_{name}"] = name in contents.present
        if modality.kind == "text":
            row[name] = contents.texts.get(name)
        elif row[f"has_{name}"]:
            member = modalities.member_of(name, members)
            content = members[member]
            found = {
                "extension": file_extension(member),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
                "source": sources.get(name),
            }
            row |= with_prefix(name, found)
    return row | measures


def with_prefix(name: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the columns of one modality under their names in the Parquet file."""
    return {f"{name}_{column}": value for column, value in columns.items()}


def measure_sample(sample: Sample, modalities: Modalities) -> dict[str, Any]:
    """Computes the measured columns of a sample without re-encoding it.

    Raises:
        MediaError: if an image or clip cannot be decoded.
        CorruptSampleError: if a text or vector of a sample of modalities cannot be read.
    """
    if modalities.is_pair:
        return measure_media(sample, modalities.media[0])
    contents = contents_of(sample, modalities)
    found: dict[str, Any] = {}
    for name, vector in contents.vectors.items():
        found |= with_prefix(name, {"length": len(vector) if vector.ndim == 2 else 1})
    for name, content in contents.media.items():
        found |= with_prefix(name, _measures(content, modalities[name].kind))
    return found


def row_of_sample(
    sample: Sample,
    modalities: Modalities,
    *,
    measures: Mapping[str, Any],
    kept: Mapping[str, KeptType],
    source: str | None = None,
    source_row: int | None = None,
) -> dict[str, Any]:
    """Builds the Parquet row of a sample of any dataset from its members.

    Args:
        sample: sample with all its members.
        modalities: modalities of the dataset.
        measures: result of `measure_sample`; empty if a modality cannot be decoded.
        kept: type of each label and kept key of the .json member.
        source: name of the tar; None if unknown.
        source_row: number of the sample in the tar, from 1; None if unknown.

    Raises:
        CorruptSampleError: if a text or vector cannot be read.
    """
    if modalities.is_pair:
        return row_of(
            sample,
            media_kind=modalities.media[0],
            measures=measures,
            kept=kept,
            source=source,
            source_row=source_row,
        )
    contents, metadata = contents_of(sample, modalities), metadata_of(sample)
    sources = {} if source is None else dict.fromkeys(contents.present, source)
    values = {**metadata, **contents.labels}
    uid, class_name = metadata.get("uid"), metadata.get("class_name")
    return {
        **row_of_contents(
            contents, modalities, measures=measures, sources=sources, members=sample.members
        ),
        "uid": sample.key if uid is None else str(uid),
        "class_name": None if class_name is None else str(class_name),
        "marks": [],
        "source_row": source_row,
        **{name: kept_value(values.get(name), kind) for name, kind in kept.items()},
    }


def signature_of(sample: Sample, modalities: Modalities) -> tuple[Any, ...] | None:
    """Returns checksums of the media and vectors, and the texts; None if one cannot be read.

    `signature_in` returns the same for the Parquet row of the sample.
    """
    try:
        if modalities.is_pair:
            media = modalities.media[0]
            if media_extension_of(sample.members, media) is None:
                return None
            content = sample.members[media_extension(sample, media)]
            return hashlib.sha256(content).hexdigest(), captions_of(sample)
        contents = contents_of(sample, modalities)
        row = row_of_contents(contents, modalities, measures={}, members=sample.members)
        return signature_in(row, modalities) if contents.present else None
    except CorruptSampleError:
        return None


def signature_in(row: Mapping[str, Any], modalities: Modalities) -> tuple[Any, ...]:
    """Returns the recorded checksums and texts of a sample."""
    if modalities.is_pair:
        return row["sha256"], row["captions"]
    return tuple(
        row.get(name if modality.kind == "text" else f"{name}_sha256")
        for name, modality in modalities.items()
    )


def checksum_columns(modalities: Modalities) -> list[str]:
    """Returns the columns with the sha256 of media and vectors."""
    if modalities.is_pair:
        return ["sha256"]
    return [f"{name}_sha256" for name, each in modalities.items() if each.kind != "text"]


def write_shard_parquet(path: Path, table: pyarrow.Table) -> None:
    """Writes a shard's Parquet file atomically."""
    write_atomically(path, parquet_bytes(table))


def check_parquet_sum(path: Path, row: ManifestRow) -> None:
    """Checks a shard's Parquet file against the checksum in its manifest row, if there is one.

    Pages of a Parquet file have checksums, but its footer, which holds minima and maxima, has none.

    Raises:
        InputError: if the file is missing or has another content.
    """
    if row.parquet_sha256 is None:
        return
    try:
        found = sha256_of(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {REPAIR_ADVICE}") from None
    if found != row.parquet_sha256:
        raise InputError(
            f"{path}: damaged or rewritten: expected sha256 {row.parquet_sha256} "
            f"(manifest.jsonl), found {found}; {REPAIR_ADVICE}"
        )


def parquet_bytes(table: pyarrow.Table) -> bytes:
    """Formats a table as a shard's Parquet file; equal tables give equal bytes."""
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def read_shard_parquet(path: Path, *, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """Reads a shard's Parquet file and verifies the checksums of its pages.

    Raises:
        InputError: if the file is missing or damaged, or is not a Parquet file.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            return file.read(columns=columns)
    except FileNotFoundError:
        raise InputError(f"{path}: missing") from None
    except (pyarrow.ArrowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"{path}: damaged Parquet file: {error}") from None


def kept_types_of(schema: pyarrow.Schema, modalities: Modalities) -> dict[str, KeptType]:
    """Returns the types of the labels and of the columns that the user kept from the input."""
    built_in = built_in_columns(modalities)
    return {field.name: str(field.type) for field in schema if field.name not in built_in}


class RepairedRows:
    """Collects Parquet rows for the samples of a repaired tar.

    Rows of the old file are reused if they match their sample; others are measured again.

    Args:
        old: content of the old Parquet file; None if it cannot be read.
        modalities: modalities of the dataset.
        kept: type of each kept column, used if `old` is None.
    """

    def __init__(
        self, old: pyarrow.Table | None, *, modalities: Modalities, kept: Mapping[str, KeptType]
    ) -> None:
        self.modalities = modalities
        self.kept = kept if old is None else kept_types_of(old.schema, modalities)
        self.rows: list[dict[str, Any]] = []
        self.num_measured = 0
        self._old = {} if old is None else {row["key"]: row for row in old.to_pylist()}

    def add(self, sample: Sample) -> None:
        """Appends the row of the next sample of the tar."""
        row = self._old.get(sample.key)
        if row is None or not self._is_of(sample, row):
            row = self._measure(sample)
            self.num_measured += 1
        self.rows.append(row)

    def _is_of(self, sample: Sample, row: Mapping[str, Any]) -> bool:
        if not self.modalities.is_pair:
            return signature_in(row, self.modalities) == signature_of(sample, self.modalities)
        content = sample.members[media_extension(sample, self.modalities.media[0])]
        return row["sha256"] == hashlib.sha256(content).hexdigest()

    def _measure(self, sample: Sample) -> dict[str, Any]:
        try:
            measures = measure_sample(sample, self.modalities)
        except MediaError:  # the sample stays in the tar; verify_shards with decode=true reports it
            measures = {}
        return row_of_sample(sample, self.modalities, measures=measures, kept=self.kept)

    def count_tags(self) -> dict[str, int]:
        """Counts the rows per tag in the column `marks`."""
        return dict(Counter(tag for row in self.rows for tag in row["marks"] or ()))

    def to_table(self) -> pyarrow.Table:
        """Converts the rows to a table with the schema of the dataset's other shards."""
        import pyarrow

        schema = schema_of(self.modalities, kept=self.kept)
        return pyarrow.Table.from_pylist(self.rows, schema=schema)
