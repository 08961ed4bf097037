"""Writes one shard from the items that it owns.

    item -> media bytes, decoded once as a check -> members and a row of the parquet
         -> or its pairs go to rejected/<shard>.jsonl, each with its reason

The parquet and the rejected pairs are on disk before the index, whose presence says that the shard
is done.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config_file import InputError
from data_prep.media_decode import (
    FormatMismatchError,
    MediaError,
    audio_seconds,
    decode_audio,
    decode_image,
)
from data_prep.pair import Pair, extension_of
from data_prep.pair_sources import Item
from data_prep.shard_format import write_atomically
from data_prep.shard_writer import ShardWriter

# An index stores sizes in 32 bits, and a sample is held in memory whole.
MAX_MEDIA_BYTES = 2**30


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to write one shard."""

    folder: Path
    name: str
    media_kind: str
    media_root: Path
    items: Sequence[Item]


class BadItemError(ValueError):
    """The media file of an item cannot be used."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def rejected_path(folder: Path, name: str) -> Path:
    """Where the rejected pairs of one shard are listed; there is no file when there are none."""
    return folder / "rejected" / f"{name}.jsonl"


def write_shard(task: ShardTask) -> int:
    """Writes the shard's parquet, rejected pairs, tar and index; returns how many items it owned.

    Raises:
        InputError: a media file is there but cannot be read.
    """
    writer = ShardWriter(task.folder, task.name)
    try:
        rows, rejected = [], []
        for item in task.items:
            good, bad = _read_item(item, task=task, writer=writer)
            rows += good
            rejected += bad
        _write_rejected(rejected_path(task.folder, task.name), rejected)
        write_atomically(task.folder / f"{task.name}.parquet", _parquet(rows, task.media_kind))
        writer.finish(rejected=dict(Counter(pair.reason for pair in rejected)))
    except BaseException:
        writer.discard()
        raise
    return len(task.items)


def _read_item(
    item: Item, *, task: ShardTask, writer: ShardWriter
) -> tuple[list[dict[str, Any]], list[Pair]]:
    """(the parquet row of the item if it is good, its rejected pairs)"""
    good = [pair for pair in item.pairs if pair.reason is None]
    bad = [pair for pair in item.pairs if pair.reason is not None]
    if not good:
        return [], bad
    try:
        content = _read_media(task.media_root / item.media)
        measures = _check_media(content, item.media, task.media_kind)
    except BadItemError as error:
        failed = {"reason": error.reason, "detail": error.detail}
        return [], [
            pair if pair.reason else dataclasses.replace(pair, **failed) for pair in item.pairs
        ]
    key = f"{item.number:012d}"
    writer.add(key, members=_members(content, good))
    row = {
        "key": key,
        "uid": good[0].uid or key,
        "captions": [pair.caption for pair in good],
        "class_name": good[0].class_name,
        "extension": extension_of(item.media),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        **measures,
        "source": item.media,
    }
    return [row], bad


def _read_media(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > MAX_MEDIA_BYTES:
            raise BadItemError("too_large", f"{size} bytes, at most {MAX_MEDIA_BYTES} are taken")
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise BadItemError("missing_file", f"{path}: {error.strerror}") from None
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise BadItemError("missing_file", f"{path}: {error.strerror}") from None
        # A fault of the disk or the network must not change the data.
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    if not content:
        raise BadItemError("empty_file", f"{path}: 0 bytes")
    return content


def _check_media(content: bytes, media: str, media_kind: str) -> dict[str, Any]:
    """What the parquet says about the decoded media."""
    try:
        return MEDIA_CHECKS[media_kind](content, extension_of(media))
    except FormatMismatchError as error:
        raise BadItemError("wrong_extension", str(error)) from None
    except MediaError as error:
        raise BadItemError("undecodable", str(error)) from None


def _check_image(content: bytes, extension: str) -> dict[str, Any]:
    height, width, _ = decode_image(content, extension).shape
    return {"height": height, "width": width}


def _check_audio(content: bytes, extension: str) -> dict[str, Any]:
    decode_audio(content, sample_rate_hz=None, extension=extension)
    seconds, sample_rate_hz = audio_seconds(content)
    return {"seconds": seconds, "sample_rate_hz": sample_rate_hz}


MEDIA_CHECKS = {"image": _check_image, "audio": _check_audio}


def _members(content: bytes, pairs: Sequence[Pair]) -> dict[str, bytes]:
    """A .json stands beside the .txt where one caption does not say everything."""
    first = pairs[0]
    members = {extension_of(first.media): content, "txt": first.caption.encode("utf-8")}
    if len(pairs) > 1 or first.class_name or first.uid:
        values = {"captions": [pair.caption for pair in pairs]}
        values |= {"class_name": first.class_name} if first.class_name else {}
        values |= {"uid": first.uid} if first.uid else {}
        members["json"] = json.dumps(values, ensure_ascii=False).encode("utf-8")
    return members


def _write_rejected(path: Path, pairs: Sequence[Pair]) -> None:
    if not pairs:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    lines = [
        {"row": pair.row, "media": pair.media, "reason": pair.reason, "detail": pair.detail}
        for pair in pairs
    ]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def _parquet(rows: Sequence[dict[str, Any]], media_kind: str) -> bytes:
    import pyarrow
    import pyarrow.parquet

    measures = {
        "image": [("height", pyarrow.int32()), ("width", pyarrow.int32())],
        "audio": [("seconds", pyarrow.float64()), ("sample_rate_hz", pyarrow.int32())],
    }
    schema = pyarrow.schema(
        [
            ("key", pyarrow.string()),
            ("uid", pyarrow.string()),
            ("captions", pyarrow.list_(pyarrow.string())),
            ("class_name", pyarrow.string()),
            ("extension", pyarrow.string()),
            ("bytes", pyarrow.int64()),
            ("sha256", pyarrow.string()),
            *measures[media_kind],
            ("source", pyarrow.string()),
        ]
    )
    sink = io.BytesIO()
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(list(rows), schema=schema), sink, compression="zstd"
    )
    return sink.getvalue()
