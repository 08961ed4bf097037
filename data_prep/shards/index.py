"""The index of a shard: offset, size and CRC32 of every member.

A `.idx` file is, little-endian:

    8 bytes               magic b"ISOIDX1\\n"
    uint32                length of the header in bytes, a multiple of 4
    header                JSON, padded with spaces: fields, num_samples, tar_bytes, tar_sha256,
                          rejected; also marked and long_keys if they are not empty
    uint32 [n, k, 3]      per sample and field: first block of the member's data (in units of 512
                          bytes from the tar's start), size in bytes, crc32; block 0xFFFFFFFF:
                          absent
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.errors import InputError

BLOCK_BYTES = 512
ABSENT = 0xFFFFFFFF
INDEX_MAGIC = b"ISOIDX1\n"
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

    @property
    def num_samples(self) -> int:
        return len(self.table)

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
        header = json.dumps(values, sort_keys=True).encode()
        header += b" " * (-len(header) % 4)
        length = np.uint32(len(header)).astype("<u4").tobytes()
        return INDEX_MAGIC + length + header + self.table.astype("<u4").tobytes()

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
        if content[:8] != INDEX_MAGIC:
            raise InputError(f"{path}: expected an index ({INDEX_MAGIC!r}), found {content[:8]!r}")
        try:
            header_end = 12 + int.from_bytes(content[8:12], "little")
            header = json.loads(content[12:header_end])
            shape = (header["num_samples"], len(header["fields"]), 3)
            long_keys = header.get("long_keys", {})
            return cls(
                fields=tuple(header["fields"]),
                table=np.frombuffer(content, "<u4", offset=header_end).reshape(shape),
                tar_bytes=header["tar_bytes"],
                tar_sha256=header["tar_sha256"],
                rejected=header["rejected"],
                marked=header.get("marked", {}),
                long_keys={int(position): key for position, key in long_keys.items()},
            )
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise InputError(
                f"{path}: damaged index ({error}); {REPAIR_ADVICE}, or recreate the shard"
            ) from None
