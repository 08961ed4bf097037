"""Writes one shard: a byte-reproducible ustar and its index.

The same samples give the same bytes: no time, owner or mode of the source file is kept. The tar is
written under a temporary name; `finish` renames the tar and then, last, the index.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from data_prep.shard_format import ABSENT, BLOCK_BYTES, ShardIndex, temporary_name, write_atomically

# Tar files end with two zero blocks.
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)


class ShardWriter:
    """Use: `add` each sample, then `finish`; `discard` after a failure.

    Args:
        folder: where the shard goes.
        name: stem of its files.
    """

    def __init__(self, folder: Path, name: str):
        self.tar_path = folder / f"{name}.tar"
        self.index_path = folder / f"{name}.idx"
        self._temporary = folder / temporary_name(f"{name}.tar")
        self._file = self._temporary.open("wb")
        self._sha256 = hashlib.sha256()
        self._num_blocks = 0
        self._rows: list[dict[str, tuple[int, int, int]]] = []

    def add(self, key: str, *, members: dict[str, bytes]) -> None:
        """Appends a sample; its members follow one another in the order of their extensions.

        Raises:
            ValueError: the key and extension together are longer than ustar's 100 bytes.
        """
        row = {}
        for extension in sorted(members):
            content = members[extension]
            self._append(_ustar_header(f"{key}.{extension}", len(content)))
            row[extension] = (self._num_blocks, len(content), zlib.crc32(content))
            self._append(content + bytes(-len(content) % BLOCK_BYTES))
        self._rows.append(row)

    def finish(
        self, *, rejected: dict[str, int] | None = None, marked: dict[str, int] | None = None
    ) -> ShardIndex:
        """Completes the tar, renames it into place, and then does the same with its index."""
        self._append(END_OF_ARCHIVE)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        fields = sorted({extension for row in self._rows for extension in row})
        table = np.zeros((len(self._rows), len(fields), 3), dtype=np.uint32)
        table[:, :, 0] = ABSENT
        for place, row in enumerate(self._rows):
            for column, extension in enumerate(fields):
                if extension in row:
                    table[place, column] = row[extension]
        index = ShardIndex(
            fields=tuple(fields),
            table=table,
            tar_bytes=self._num_blocks * BLOCK_BYTES,
            tar_sha256=self._sha256.hexdigest(),
            rejected=rejected or {},
            marked=marked or {},
        )
        self._temporary.replace(self.tar_path)
        write_atomically(self.index_path, index.to_bytes())
        return index

    def discard(self) -> None:
        """Removes the unfinished tar."""
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _append(self, content: bytes) -> None:
        self._file.write(content)
        self._sha256.update(content)
        self._num_blocks += len(content) // BLOCK_BYTES


def _ustar_header(name: str, size: int) -> bytes:
    encoded = name.encode("utf-8")
    if len(encoded) > 100:
        raise ValueError(f"member name of {len(encoded)} bytes, at most 100 fit in ustar: {name}")
    header = b"".join(
        [
            encoded.ljust(100, b"\0"),
            b"0000644\0" + b"0000000\0" + b"0000000\0",  # mode, owner, group
            b"%011o\0" % size,
            b"%011o\0" % 0,  # time of change
            b" " * 8,  # checksum, counted as spaces
            b"0" + bytes(100),  # an ordinary file, no link
            b"ustar\0" + b"00",
        ]
    ).ljust(BLOCK_BYTES, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]
