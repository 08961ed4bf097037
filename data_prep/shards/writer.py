"""Writer of a shard: a byte-reproducible ustar file and its index.

Equal samples produce equal bytes, because time, owner and mode of source files are not stored. The
tar is written under a temporary name; `finish` renames the tar and then writes the index.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import zlib
from pathlib import Path

import numpy as np

from data_prep.modalities.modality import Modalities
from data_prep.shards.index import (
    ABSENT,
    BLOCK_BYTES,
    ShardIndex,
)
from data_prep.shards.sample_contents import PresenceTable, SampleContents
from data_prep.storage.atomic import (
    name_file,
    temporary_name,
    write_atomically,
)

# Tar files end with two zero blocks.
END_OF_ARCHIVE = bytes(2 * BLOCK_BYTES)
WRITE_BUFFER_BYTES = 2**20
# Members below this size are written in one call with their header; larger members are not copied.
JOINED_BYTES = 4096

NAME_BYTES, PREFIX_BYTES = 100, 155
# A ustar header is name, RIGHTS, size, TIME, checksum, KIND, prefix, 12 zero bytes.
RIGHTS = b"0000644\0" + b"0000000\0" + b"0000000\0"  # mode, owner, group
TIME = b"%011o\0" % 0
KIND = b"0" + bytes(100) + b"ustar\0" + b"00" + bytes(80)  # regular file, no link, no owner names
# Sum of all constant bytes; the checksum field counts as eight spaces.
CONSTANT_SUM = sum(RIGHTS + TIME + b" " * 8 + KIND)


class ShardWriter:
    """Writes a shard: call `add` for each sample, then `finish`, or `discard` after a failure.

    Args:
        folder: folder of the shard.
        name: stem of the shard's files.
        modalities: modalities of the dataset; None: a pair dataset.
    """

    def __init__(self, folder: Path, name: str, *, modalities: Modalities | None = None):
        self.tar_path = folder / f"{name}.tar"
        self.index_path = folder / f"{name}.idx"
        self._temporary = folder / temporary_name(f"{name}.tar")
        self._file = self._temporary.open("wb", buffering=WRITE_BUFFER_BYTES)
        self._sha256 = hashlib.sha256()
        self._num_blocks = 0
        self._num_samples = 0
        self._field_numbers: dict[str, int] = {}  # extension -> number, by first appearance
        self._entries: list[int] = []  # per member: position, field number, data block, size, CRC32
        self._presence = PresenceTable(modalities)

    def add(
        self, key: str, *, members: dict[str, bytes], contents: SampleContents | None = None
    ) -> None:
        """Appends a sample; its members are written in the order of their extensions.

        Args:
            key: key of the sample.
            members: extension without dot -> bytes.
            contents: the members sorted by modality; None only for a pair dataset.

        Raises:
            ValueError: if the name of a member is too long for ustar.
            OSError: if the tar cannot be written, for example because the disk is full.
        """
        for extension in sorted(members):
            content = members[extension]
            header = ustar_header(f"{key}.{extension}", len(content))
            self._append_member(header, content)
            field = self._field_numbers.setdefault(extension, len(self._field_numbers))
            self._entries += (
                self._num_samples,
                field,
                self._num_blocks + 1,
                len(content),
                zlib.crc32(content),
            )
            self._num_blocks += 1 + -(-len(content) // BLOCK_BYTES)
        self._num_samples += 1
        self._presence.add(contents)

    def finish(
        self, *, rejected: dict[str, int] | None = None, marked: dict[str, int] | None = None
    ) -> ShardIndex:
        """Completes the tar, renames it into place, and then writes the index.

        Raises:
            OSError: if a file cannot be written, for example because the disk is full.
        """
        self._append(END_OF_ARCHIVE)
        self._num_blocks += len(END_OF_ARCHIVE) // BLOCK_BYTES
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._temporary.replace(self.tar_path)
        except OSError as error:
            raise name_file(error, self.tar_path) from None
        fields, table = self._table()
        index = ShardIndex(
            fields=fields,
            table=table,
            tar_bytes=self._num_blocks * BLOCK_BYTES,
            tar_sha256=self._sha256.hexdigest(),
            rejected=rejected or {},
            marked=marked or {},
            **self._presence.to_fields(),
        )
        write_atomically(self.index_path, index.to_bytes())
        return index

    def discard(self) -> None:
        """Removes the unfinished tar."""
        with contextlib.suppress(OSError):  # closing flushes the buffer; the disk may be full
            self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _append_member(self, header: bytes, content: bytes) -> None:
        padding = bytes(-len(content) % BLOCK_BYTES)
        if len(content) < JOINED_BYTES:
            self._append(header + content + padding)
            return
        self._append(header)
        self._append(content)
        self._append(padding)

    def _append(self, content: bytes) -> None:
        self._sha256.update(content)
        try:
            self._file.write(content)
        except OSError as error:
            raise name_file(error, self.tar_path) from None

    def _table(self) -> tuple[tuple[str, ...], np.ndarray]:
        fields = sorted(self._field_numbers)
        column_of = np.array([fields.index(name) for name in self._field_numbers], dtype=np.int64)
        entries = np.array(self._entries, dtype=np.int64).reshape(-1, 5)
        table = np.zeros((self._num_samples, len(fields), 3), dtype=np.uint32)
        table[:, :, 0] = ABSENT
        if len(entries):
            table[entries[:, 0], column_of[entries[:, 1]]] = entries[:, 2:]
        return tuple(fields), table


def ustar_header(name: str, size: int) -> bytes:
    """Builds the header block of a regular file, with fixed owner, time and mode.

    Raises:
        ValueError: if the name does not fit into 100 bytes plus 155 bytes for its folders.
    """
    prefix, short_name = _split_name(name.encode("utf-8"))
    size_digits = b"%011o\0" % size
    checksum = CONSTANT_SUM + sum(prefix) + sum(short_name) + sum(size_digits)
    return b"".join(
        (
            short_name.ljust(NAME_BYTES, b"\0"),
            RIGHTS,
            size_digits,
            TIME,
            b"%06o\0 " % checksum,
            KIND,
            prefix.ljust(PREFIX_BYTES + 12, b"\0"),
        )
    )


def _split_name(name: bytes) -> tuple[bytes, bytes]:
    """Returns (prefix, name); readers join them with a slash unless the prefix is empty."""
    if len(name) <= NAME_BYTES:
        return b"", name
    prefix, _, short_name = name[: PREFIX_BYTES + 1].rpartition(b"/")
    short_name += name[PREFIX_BYTES + 1 :]
    if not prefix or len(short_name) > NAME_BYTES:
        raise ValueError(
            f"member name of {len(name)} bytes: ustar allows at most {NAME_BYTES} bytes after a "
            f"slash within the first {PREFIX_BYTES + 1}; found {name.decode()}"
        )
    return prefix, short_name
