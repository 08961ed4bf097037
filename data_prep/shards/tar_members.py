"""Reader of tar headers, with checks for damage and for members that a dataset must not contain.

Python's tarfile stops silently at a damaged header, or if the tar is truncated between two members.
`read_members` requires the end-of-archive blocks, and only regular files with safe names: relative,
without '..' and control characters. Names need not be printable: macOS writes U+202F in those of
screenshots.
`find_members` continues after damage to recover the remaining members.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.errors import InputError
from data_prep.shards.index import BLOCK_BYTES
from data_prep.shards.sample import split_member_name

MAX_LONG_NAME_BYTES = 65_536  # limit for a PAX or GNU header, which is read into memory
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
# They would end a line of a log or act on a terminal.
CONTROL_CHARACTERS = re.compile("[\\x00-\\x1f\\x7f-\\x9f]")
EXTENSION_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file in a tar."""

    name: str
    data_block: int  # start of the content, in blocks of 512 bytes
    num_bytes: int

    @property
    def key(self) -> str:
        """Key of the sample."""
        return split_member_name(self.name)[0]

    @property
    def extension(self) -> str:
        """Rest of the name after the key, without the first dot."""
        return split_member_name(self.name)[1]


class BadTarError(InputError):
    """A tar, or a member of it, that cannot be used."""


def read_members(path: Path, *, any_encoding: bool = False) -> Iterator[Member]:
    """Yields the members of samples in a tar, in order.

    Folders and files that WebDataset readers ignore are skipped: names without an extension, hidden
    files and `__name__`.

    Args:
        path: path of the tar.
        any_encoding: True to accept names that are not UTF-8, with lone surrogates. An index cannot
            store such keys.

    Raises:
        BadTarError: if the tar is compressed, damaged or truncated. Also if it contains a link, a
            device, a sparse file, or a name that points outside the folder. A name in a sample must
            not hold a control character either, and must be UTF-8 unless `any_encoding` is set.
    """
    _refuse_compressed(path)
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_CappedTarInfo) as tar:
                for info in tar:
                    tar.members = []  # otherwise tarfile keeps all headers in memory
                    _check_type(info, path)
                    _check_path(info.name, path)
                    if info.isreg() and _is_sample_name(info.name):
                        _check_characters(info.name, path)
                        if not any_encoding:
                            _check_is_utf8(info.name, path)
                        yield Member(info.name, info.offset_data // BLOCK_BYTES, info.size)
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            raise BadTarError(f"{path}: corrupt or truncated: {error}") from None
        _check_end(path, end)


def find_members(path: Path) -> Iterator[Member | None]:
    """Yields the members of a damaged tar that have a valid header and are complete.

    Only plain ustar headers are supported, which ShardWriter writes. Yields None wherever something
    is missing between two members or at the end.
    """
    tar_bytes = path.stat().st_size
    offset, num_skipped, is_damaged = 0, 0, False
    with path.open("rb") as file:
        while offset + BLOCK_BYTES <= tar_bytes:
            file.seek(offset)
            block = file.read(BLOCK_BYTES)
            member = member_at(block, data_block=offset // BLOCK_BYTES + 1)
            offset += BLOCK_BYTES
            if member is None or offset + member.num_bytes > tar_bytes:
                num_skipped += 1
                is_damaged = is_damaged or any(block)
                continue
            if num_skipped:
                yield None
            num_skipped, is_damaged = 0, False
            yield member
            offset += -(-member.num_bytes // BLOCK_BYTES) * BLOCK_BYTES
    if is_damaged or num_skipped < 2:
        yield None


def member_at(header: bytes, *, data_block: int) -> Member | None:
    """Parses a ustar header; returns None if it is damaged, or the member is not part of a sample.

    Args:
        header: block of a tar whose members have no PAX or GNU headers.
        data_block: index of the block after the header, where the content starts.
    """
    try:
        info = _CappedTarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, BadTarError):
        return None
    if not info.isreg() or not _is_sample_name(info.name):
        return None
    is_text = _is_utf8(info.name) and not CONTROL_CHARACTERS.search(info.name)
    is_usable = is_text and not _points_outside(info.name)
    return Member(info.name, data_block, info.size) if is_usable else None


class _CappedTarInfo(tarfile.TarInfo):
    """A header whose declared size is checked before that many bytes are read."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _CappedTarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise BadTarError(f"{info.name}: invalid member size of {info.size} bytes")
        if info.type in EXTENSION_HEADERS and info.size > MAX_LONG_NAME_BYTES:
            raise BadTarError(
                f"{info.name}: expected a long-name header of at most {MAX_LONG_NAME_BYTES} bytes, "
                f"found {info.size}"
            )
        return info


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise BadTarError(
                f"{path}: expected a plain tar, found {name}; decompress it, because "
                "compressed tars have no random access"
            )


def _check_type(info: tarfile.TarInfo, path: Path) -> None:
    if info.size < 0:  # a PAX header may declare any size
        raise BadTarError(f"{path}: {info.name}: invalid member size of {info.size} bytes")
    if info.issparse() or not (info.isreg() or info.isdir()):
        kind = "a sparse file" if info.issparse() else f"type {info.type!r} (a link or device)"
        raise BadTarError(f"{path}: {info.name}: expected a regular file, found {kind}")


def _check_path(name: str, path: Path) -> None:
    if _points_outside(name):
        raise BadTarError(f"{path}: {name!r}: expected a relative name without '..' in a tar")


def _points_outside(name: str) -> bool:
    return name.startswith("/") or ".." in PurePosixPath(name).parts


def _check_characters(name: str, path: Path) -> None:
    found = CONTROL_CHARACTERS.search(name)
    if found:
        raise BadTarError(
            f"{path}: {name!r}: expected a name without control characters, found "
            f"U+{ord(found[0]):04X}; pack the tar again with another name"
        )


def _check_is_utf8(name: str, path: Path) -> None:
    if not _is_utf8(name):
        raise BadTarError(
            f"{path}: {name!r}: expected a name in UTF-8, because an index stores it as text; use "
            "python -m data_prep.make_shards, which gives samples new names"
        )


def _is_utf8(name: str) -> bool:
    return all(not "\ud800" <= character <= "\udfff" for character in name)


def _is_sample_name(name: str) -> bool:
    stem, dot, _ = name.rpartition("/")[2].partition(".")
    return bool(stem and dot) and not (name.startswith("__") and name.endswith("__"))


def _check_end(path: Path, end: int) -> None:
    """Checks that at least two zero blocks, and only zeros, follow the last member."""
    with path.open("rb") as file:
        file.seek(end)
        num_zeros = 0
        while chunk := file.read(1 << 20):
            if chunk.count(0) != len(chunk):
                raise BadTarError(
                    f"{path}: expected a header or the end of the archive at byte {end}, found "
                    "a damaged header or bytes after the end"
                )
            num_zeros += len(chunk)
    if num_zeros < 2 * BLOCK_BYTES:
        raise BadTarError(
            f"{path}: truncated: expected the two end-of-archive blocks at byte {end}, found "
            f"{num_zeros} bytes"
        )
