"""The index of a shard: offset, size and CRC32 of every member, and the modalities of each sample.

A `.idx` file is, little-endian:

    8 bytes               magic b"ISOIDX1\\n" for pair datasets, b"ISOIDX2\\n" for all others
    uint32                length of the header in bytes, a multiple of 4
    header                JSON, padded with spaces: fields, num_samples, tar_bytes, tar_sha256,
                          rejected; also marked and long_keys if they are not empty
    uint32 [n, k, 3]      per sample and field: first block of the member's data (in units of 512
                          bytes from the tar's start), size in bytes, crc32; block 0xFFFFFFFF:
                          absent

The header of version 2 also has `modalities`, a list of [name, {"kind": ...}] in the dataset's
order, and `vectors`, {name: [number of rows, width]}. After the table:

    uint32 [n]            presence masks: bit k is set if the sample has modality k
    float64 [2, width]    for each of `vectors`: mean and sum of squared deviations of each column
    uint32                crc32 of everything before
"""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.modalities.vectors import VectorSums

BLOCK_BYTES = 512
ABSENT = 0xFFFFFFFF
INDEX_MAGIC = b"ISOIDX1\n"
INDEX_MAGIC_2 = b"ISOIDX2\n"
REPAIR_ADVICE = "rebuild it with python -m data_prep.verify_shards and repair=true"


@dataclass(frozen=True)
class ShardIndex:
    """Offsets, sizes and checksums of the members of all samples of a shard."""

    fields: tuple[str, ...]
    table: np.ndarray  # uint32 [n, k, 3]: data block, size in bytes, crc32
    tar_bytes: int
    tar_sha256: str
    rejected: dict[str, int] = field(default_factory=dict)  # reason -> number of dropped pairs
    # filter -> number of samples flagged but kept
    marked: dict[str, int] = field(default_factory=dict)
    # Position in the shard -> key, for foreign tars that store the key in a PAX or GNU header.
    long_keys: dict[int, str] = field(default_factory=dict)
    modalities: Modalities | None = None  # in the order of the bits; None: of a pair dataset
    presence: np.ndarray | None = None  # uint32 [n]; None: all samples are complete pairs
    vector_sums: dict[str, VectorSums] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.table)

    def num_having(self, bit: int) -> int:
        """Returns the number of samples that have the modality of a bit."""
        if self.presence is None:
            return self.num_samples
        return int(np.count_nonzero(self.presence & np.uint32(1 << bit)))

    def entries_at(self, position: int) -> dict[str, tuple[int, int, int]]:
        """Returns {extension: (data block, size in bytes, CRC32)} for the members of one sample."""
        entries = zip(self.fields, self.table[position].tolist(), strict=True)
        return {name: tuple(entry) for name, entry in entries if entry[0] != ABSENT}

    def to_bytes(self) -> bytes:
        values = {
            "fields": list(self.fields),
            "num_samples": self.num_samples,
            "tar_bytes": self.tar_bytes,
            "tar_sha256": self.tar_sha256,
            "rejected": self.rejected,
        }
        if self.marked:
            values["marked"] = self.marked
        if self.long_keys:
            values["long_keys"] = self.long_keys
        if self.presence is not None:
            assert self.modalities is not None
            values["modalities"] = list(self.modalities.to_json().items())
            values["vectors"] = {
                name: [sums.num_rows, len(sums.mean)] for name, sums in self.vector_sums.items()
            }
        header = json.dumps(values, sort_keys=True).encode()
        header += b" " * (-len(header) % 4)
        length = np.uint32(len(header)).astype("<u4").tobytes()
        table = self.table.astype("<u4").tobytes()
        if self.presence is None:
            return INDEX_MAGIC + length + header + table
        content = INDEX_MAGIC_2 + length + header + table + self._tail()
        return content + np.uint32(zlib.crc32(content)).astype("<u4").tobytes()

    def _tail(self) -> bytes:
        """Returns the arrays after the table of version 2."""
        sums = [np.stack([each.mean, each.squares]) for _, each in sorted(self.vector_sums.items())]
        return self.presence.astype("<u4").tobytes() + b"".join(
            each.astype("<f8").tobytes() for each in sums
        )

    @classmethod
    def read(cls, path: Path) -> ShardIndex:
        """Reads an index.

        Args:
            path: path of the .idx file.

        Raises:
            InputError: if the file is missing or damaged, or has a different format version.
        """
        try:
            return cls.parse(path.read_bytes(), path)
        except FileNotFoundError:
            raise InputError(
                f"{path}: no index; create it with python -m data_prep.index_shards"
            ) from None
        except (IsADirectoryError, NotADirectoryError) as error:
            raise InputError(f"{path}: expected an index: {error.strerror}") from None

    @classmethod
    def parse(cls, content: bytes, path: Path | str) -> ShardIndex:
        """Parses the content of an index.

        Args:
            content: content of an .idx file.
            path: path or URL of the file, for messages.

        Raises:
            InputError: if the content is damaged, or has a different format version.
        """
        magic = content[:8]
        if magic not in (INDEX_MAGIC, INDEX_MAGIC_2):
            raise InputError(
                f"{path}: expected an index ({INDEX_MAGIC!r} or {INDEX_MAGIC_2!r}), found {magic!r}"
            )
        try:
            header_end = 12 + int.from_bytes(content[8:12], "little")
            header = json.loads(content[12:header_end])
            shape = (header["num_samples"], len(header["fields"]), 3)
            rest: dict[str, Any] = {}
            if "long_keys" in header:
                long_keys = header["long_keys"].items()
                rest["long_keys"] = {int(position): key for position, key in long_keys}
            if magic == INDEX_MAGIC_2:
                if zlib.crc32(content[:-4]) != int.from_bytes(content[-4:], "little"):
                    raise ValueError("crc32 mismatch")
                table_end = header_end + 4 * math.prod(shape)
                rest |= _parse_tail(content[table_end:-4], header)
                content = content[:table_end]
            return cls(
                fields=tuple(header["fields"]),
                table=np.frombuffer(content, "<u4", offset=header_end).reshape(shape),
                tar_bytes=header["tar_bytes"],
                tar_sha256=header["tar_sha256"],
                rejected=header["rejected"],
                marked=header.get("marked", {}),
                **rest,
            )
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{path}: damaged index ({error}); {REPAIR_ADVICE}, or recreate the shard"
            ) from None


def _parse_tail(tail: bytes, header: dict[str, Any]) -> dict[str, Any]:
    """Parses the arrays after the table of version 2; returns fields of ShardIndex."""
    num_samples, start = header["num_samples"], 4 * header["num_samples"]
    sums = {}
    for name, (num_rows, width) in sorted(header["vectors"].items()):
        both = np.frombuffer(tail, "<f8", count=2 * width, offset=start).reshape(2, width)
        sums[name] = VectorSums(num_rows, both[0], both[1])
        start += 16 * width
    if start != len(tail):
        raise ValueError(f"expected {start} bytes after the table, found {len(tail)}")
    presence = np.frombuffer(tail, "<u4", count=num_samples)
    modalities = Modalities.from_json(dict(header["modalities"]))
    return {"modalities": modalities, "presence": presence, "vector_sums": sums}
