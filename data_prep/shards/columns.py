"""The columns of a shard's Parquet: what people, filters and reports know about each sample.

Row n of `00000000.parquet` is sample n of `00000000.tar`. Training never reads these files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import pyarrow

KeptType = Literal["bool", "int64", "double", "string"]

FIRST_COLUMNS = [
    ("key", pyarrow.string()),  # the sample's key in the tar
    ("uid", pyarrow.string()),  # the user's own identifier, else the key
    ("captions", pyarrow.list_(pyarrow.string())),
    ("class_name", pyarrow.string()),
    ("language", pyarrow.string()),  # of the first caption, where it was detected
    ("marks", pyarrow.list_(pyarrow.string())),  # filters that would have dropped it
    ("extension", pyarrow.string()),  # of the media member
    ("bytes", pyarrow.int64()),  # of the media member
    ("sha256", pyarrow.string()),  # of the media member
]
# Named as the dictionaries of image_fingerprint and audio_fingerprint, and of media_preparation.
MEASURES = {
    "image": [
        ("height", pyarrow.int32()),  # as stored
        ("width", pyarrow.int32()),
        ("source_height", pyarrow.int32()),  # before re-encoding
        ("source_width", pyarrow.int32()),
        ("is_reencoded", pyarrow.bool_()),
        ("phash", pyarrow.uint64()),  # perceptual hash
        ("phash_mirrored", pyarrow.uint64()),  # of the picture mirrored left to right
        ("signature", pyarrow.binary()),  # second signature, which confirms candidates
    ],
    "audio": [
        ("seconds", pyarrow.float64()),  # as stored
        ("sample_rate_hz", pyarrow.int32()),
        ("channels", pyarrow.int32()),
        ("start_seconds", pyarrow.float64()),  # of a clip cut out of a longer one
        ("source_seconds", pyarrow.float64()),  # before cutting
        ("is_reencoded", pyarrow.bool_()),
        ("fingerprint", pyarrow.binary()),  # spectral fingerprint
    ],
}
LAST_COLUMNS = [
    ("source", pyarrow.string()),  # media path or URL as the input gave it
    ("source_row", pyarrow.int64()),  # line or place in the input, from 1
]
KEPT_TYPES = {
    "bool": pyarrow.bool_(),
    "int64": pyarrow.int64(),
    "double": pyarrow.float64(),
    "string": pyarrow.string(),
}


def shard_schema(media_kind: str, *, kept: Mapping[str, KeptType]) -> pyarrow.Schema:
    """The schema of every shard's Parquet in one dataset.

    Args:
        media_kind: "image" or "audio".
        kept: type of each column that the user keeps besides ours.
    """
    kept_columns = [(name, KEPT_TYPES[kind]) for name, kind in kept.items()]
    return pyarrow.schema([*FIRST_COLUMNS, *MEASURES[media_kind], *LAST_COLUMNS, *kept_columns])


def own_columns(media_kind: str) -> set[str]:
    """The names that a kept column cannot have."""
    return {name for name, _ in (*FIRST_COLUMNS, *MEASURES[media_kind], *LAST_COLUMNS)}
