"""Columns of a shard's Parquet file, which describes each sample for users, filters and reports.

Row n of `00000000.parquet` describes sample n of `00000000.tar`. Training never reads these files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import pyarrow

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities

KeptType = Literal["bool", "int64", "double", "string"]
# While types are collected, integers that a double would round have a type of their own.
CollectedType = KeptType | Literal["large int64"]
FIRST_COLUMNS = [
    ("key", pyarrow.string()),  # the sample's key in the tar
    ("uid", pyarrow.string()),  # the user's identifier; the key if there is none
    ("captions", pyarrow.list_(pyarrow.string())),
    ("class_name", pyarrow.string()),
    ("language", pyarrow.string()),  # language of the first caption, if detected
    (
        "marks",
        pyarrow.list_(pyarrow.string()),
    ),  # filters that flagged the sample without dropping it
    ("extension", pyarrow.string()),  # extension of the media member
    ("bytes", pyarrow.int64()),  # size of the media member
    ("sha256", pyarrow.string()),  # sha256 of the media member
]
# The names are keys of the dictionaries that data_prep.media.{preparation,*_fingerprint} return.
MEASURES = {
    "image": [
        ("height", pyarrow.int32()),  # as stored
        ("width", pyarrow.int32()),
        ("source_height", pyarrow.int32()),  # before re-encoding
        ("source_width", pyarrow.int32()),
        ("is_reencoded", pyarrow.bool_()),
        ("phash", pyarrow.uint64()),  # perceptual hash
        ("phash_mirrored", pyarrow.uint64()),  # perceptual hash of the mirrored image
        ("signature", pyarrow.binary()),  # thumbnail that confirms candidates found by phash
    ],
    "audio": [
        ("seconds", pyarrow.float64()),  # as stored
        ("sample_rate_hz", pyarrow.int32()),
        ("channels", pyarrow.int32()),
        ("start_seconds", pyarrow.float64()),  # start of the clip in the recording
        ("source_seconds", pyarrow.float64()),  # length of the recording before cutting
        ("is_reencoded", pyarrow.bool_()),
        ("fingerprint", pyarrow.binary()),  # spectral fingerprint
    ],
}
# Columns NAME_... of an image, audio clip or vector of samples of modalities.
MEMBER_COLUMNS = [
    ("extension", pyarrow.string()),
    ("bytes", pyarrow.int64()),
    ("sha256", pyarrow.string()),
    ("source", pyarrow.string()),  # path or URL as given in the input
]
VECTOR_MEASURES = [("length", pyarrow.int32())]  # of a sequence in time; 1 for any other vector
LAST_COLUMNS = [
    ("source", pyarrow.string()),  # media path or URL as given in the input
    ("source_row", pyarrow.int64()),  # line or row number in the input, from 1
]
KEPT_TYPES = {
    "bool": pyarrow.bool_(),
    "int64": pyarrow.int64(),
    "double": pyarrow.float64(),
    "string": pyarrow.string(),
}


def shard_schema(media_kind: str, *, kept: Mapping[str, KeptType]) -> pyarrow.Schema:
    """Returns the schema of all Parquet files of a dataset.

    Args:
        media_kind: "image" or "audio".
        kept: type of each input column that the user keeps.
    """
    kept_columns = [(name, KEPT_TYPES[kind]) for name, kind in kept.items()]
    return pyarrow.schema([*FIRST_COLUMNS, *MEASURES[media_kind], *LAST_COLUMNS, *kept_columns])


def own_columns(media_kind: str) -> set[str]:
    """Returns the names of built-in columns of pairs, which kept columns must not have."""
    return {name for name, _ in (*FIRST_COLUMNS, *MEASURES[media_kind], *LAST_COLUMNS)}


# ------------------------------------------------------------------------- samples of modalities


def schema_of(
    modalities: Modalities,
    *,
    kept: Mapping[str, KeptType],
    labels: Mapping[str, KeptType] = MappingProxyType({}),
) -> pyarrow.Schema:
    """Returns the schema of all Parquet files of a dataset, with the columns of each modality.

    Args:
        modalities: modalities of the dataset; for a pair dataset this is `shard_schema`.
        kept: type of each input column that the user keeps.
        labels: type of each label.
    """
    if modalities.is_pair:
        return shard_schema(modalities.media[0], kept=kept)
    named = [(name, KEPT_TYPES[kind]) for name, kind in {**labels, **kept}.items()]
    return pyarrow.schema([*_columns_of(modalities), *named])


def _columns_of(modalities: Modalities) -> list[tuple[str, pyarrow.DataType]]:
    names = ("key", "uid", "class_name", "language", "marks")
    columns = [(name, kind) for name, kind in FIRST_COLUMNS if name in names]
    for name, modality in modalities.items():
        columns.append((f"has_{name}", pyarrow.bool_()))
        if modality.kind == "text":
            columns.append((name, pyarrow.list_(pyarrow.string())))
            continue
        columns += [(f"{name}_{each}", kind) for each, kind in member_columns(modality.kind)]
    return [*columns, ("source_row", pyarrow.int64())]


def member_columns(kind: str) -> list[tuple[str, pyarrow.DataType]]:
    """Returns the columns NAME_... of an image, audio clip or vector, without the prefix."""
    return [*MEMBER_COLUMNS, *MEASURES.get(kind, VECTOR_MEASURES)]


def built_in_columns(modalities: Modalities) -> set[str]:
    """Returns the names of built-in columns, which labels and kept columns must not have."""
    if modalities.is_pair:
        return own_columns(modalities.media[0])
    return {name for name, _ in _columns_of(modalities)}


def check_kept_names(names: Iterable[str], *, modalities: Modalities) -> None:
    """Checks that no column to keep, and no label, has the name of a built-in column.

    Raises:
        InputError: if a name is already in use.
    """
    names = list(names)
    taken = built_in_columns(modalities).intersection(names)
    if taken:
        raise InputError(
            f"keep_columns: {', '.join(sorted(taken))}: built-in Parquet columns have these names; "
            "rename your columns in the input, or remove them from keep_columns"
        )
    columns = names if modalities.is_pair else [*names, *(n for n, _ in _columns_of(modalities))]
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise InputError(
            f"columns: {', '.join(twice)}: two Parquet columns would have this name; rename a "
            "modality or label, or remove it from keep_columns"
        )


# ----------------------------------------------------------------------- types of kept columns


class KeptTypes:
    """Collects the narrowest type for each column to keep that can represent all its values."""

    def __init__(self, columns: Iterable[str]):
        self.known: dict[str, CollectedType | None] = dict.fromkeys(columns)

    def add(self, values: Mapping[str, Any]) -> None:
        """Adds the values of one sample."""
        for name in self.known:
            self.known[name] = common_type(self.known[name], type_of(values.get(name)))

    def merge(self, other: Mapping[str, CollectedType | None]) -> None:
        """Adds the types of other samples."""
        for name, kind in other.items():
            self.known[name] = common_type(self.known[name], kind)

    def types(self, *, found_in: str, key: str = "keep_columns") -> dict[str, KeptType]:
        """Returns the type of each column.

        Args:
            found_in: name of the input, for the message.
            key: config key of the columns, for the message.

        Raises:
            InputError: if a column to keep has no value in any row.
        """
        for name, kind in self.known.items():
            if kind is None:
                value = "value" if key == "keep_columns" else "text or number"
                raise InputError(
                    f"{found_in}: {key}: {name!r} has no {value} in any row; check its "
                    "spelling, or remove it"
                )
        return {
            name: "int64" if kind == "large int64" else kind
            for name, kind in self.known.items()
            if kind is not None
        }


def type_of(value: Any) -> CollectedType | None:
    """Returns the narrowest type that can represent a value; None for a missing value."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "int64" if float(value) == value else "large int64"
    return "double" if isinstance(value, float) else "string"


def common_type(first: CollectedType | None, second: CollectedType | None) -> CollectedType | None:
    """Returns the narrowest type that can represent the values of two types without rounding."""
    if first == second or second is None:
        return first
    if first is None:
        return second
    both = {first, second}
    if both == {"int64", "large int64"}:
        return "large int64"
    return "double" if both == {"int64", "double"} else "string"


def kept_value(value: Any, kind: KeptType) -> Any:
    """Converts a value to the type of its column."""
    if value is None:
        return None
    if kind == "double":
        return float(value)
    if kind == "string" and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value
