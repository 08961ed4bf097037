"""Walks the headers of a tar, and refuses what a dataset must not hold.

Python's tarfile ends silently at a damaged header and at a cut between two members; here a tar must
end with its end-of-archive blocks, and everything in it must be an ordinary file with a plain name.
`find_members` instead goes on behind damage, for what can still be saved.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from data_prep.errors import InputError
from data_prep.shards.index import BLOCK_BYTES
from data_prep.shards.sample import split_member_name

MAX_LONG_NAME_BYTES = 65_536  # of a PAX or GNU header, which is read into memory
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
EXTENSION_HEADERS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


@dataclass(frozen=True, slots=True)
class Member:
    """One ordinary file in a tar."""

    name: str
    data_block: int  # where its bytes start, in blocks of 512
    num_bytes: int

    @property
    def key(self) -> str:
        """The sample it belongs to."""
        return split_member_name(self.name)[0]

    @property
    def extension(self) -> str:
        """What it is of the sample, without the first dot."""
        return split_member_name(self.name)[1]


class BadTarError(InputError):
    """A tar, or one of its members, that cannot be used."""


def read_members(path: Path) -> Iterator[Member]:
    """The ordinary files of a tar in order, without folders and names that are no sample's.

    WebDataset readers skip the same names: those without an extension, hidden ones, `__name__`.

    Raises:
        BadTarError: the tar is compressed, damaged or cut short, or holds a link, a device, a
            sparse file, or a name that leads out of a folder.
    """
    _refuse_compressed(path)
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:", tarinfo=_CappedTarInfo) as tar:
                for info in tar:
                    tar.members = []  # it would keep every header otherwise
                    _check_type(info, path)
                    if info.isreg() and _is_sample_name(_check_name(info.name, path)):
                        yield Member(info.name, info.offset_data // BLOCK_BYTES, info.size)
                end = tar.offset
        except (tarfile.TarError, EOFError) as error:
            raise BadTarError(f"{path}: corrupt or cut short: {error}") from None
        _check_end(path, end)


def find_members(path: Path) -> Iterator[Member | None]:
    """The members of a damaged tar whose header is sound and whose bytes are all there.

    Only plain ustar headers are understood, as ShardWriter writes them. None stands where something
    is missing: between two members, or at the end.
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
    """What a member's own header says; None if it is damaged or no sample's.

    Args:
        header: one block, of a tar whose samples need no header before their own.
        data_block: where its bytes start.
    """
    try:
        info = _CappedTarInfo.frombuf(header, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, BadTarError):
        return None
    is_plain = info.isreg() and _is_plain_name(info.name) and _is_sample_name(info.name)
    return Member(info.name, data_block, info.size) if is_plain else None


class _CappedTarInfo(tarfile.TarInfo):
    """A header whose claimed sizes are checked before anything of that size is read."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> _CappedTarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0:
            raise BadTarError(f"{info.name}: a member of {info.size} bytes")
        if info.type in EXTENSION_HEADERS and info.size > MAX_LONG_NAME_BYTES:
            raise BadTarError(
                f"{info.name}: a header of {info.size} bytes; at most {MAX_LONG_NAME_BYTES} are "
                "read for a name"
            )
        return info


def _refuse_compressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(8)
    for magic, name in COMPRESSIONS.items():
        if start.startswith(magic):
            raise BadTarError(
                f"{path}: expected a plain tar, found {name}; samples of a compressed tar cannot "
                "be read one by one: decompress it"
            )


def _check_type(info: tarfile.TarInfo, path: Path) -> None:
    if info.size < 0:  # a PAX header may say so
        raise BadTarError(f"{path}: {info.name}: a member of {info.size} bytes")
    if info.issparse() or not (info.isreg() or info.isdir()):
        kind = "a sparse file" if info.issparse() else f"type {info.type!r} (a link or device)"
        raise BadTarError(f"{path}: {info.name}: expected an ordinary file, found {kind}")


def _check_name(name: str, path: Path) -> str:
    if not _is_plain_name(name):
        raise BadTarError(
            f"{path}: {name!r}: expected a printable relative name without '..' in a tar"
        )
    return name


def _is_plain_name(name: str) -> bool:
    is_text = name.isprintable()  # neither control characters nor bytes that are not UTF-8
    return is_text and not name.startswith("/") and ".." not in PurePosixPath(name).parts


def _is_sample_name(name: str) -> bool:
    stem, dot, _ = name.rpartition("/")[2].partition(".")
    return bool(stem and dot) and not (name.startswith("__") and name.endswith("__"))


def _check_end(path: Path, end: int) -> None:
    """After the last member: two zero blocks, and nothing but zeros up to the end."""
    with path.open("rb") as file:
        file.seek(end)
        num_zeros = 0
        while piece := file.read(1 << 20):
            if piece.count(0) != len(piece):
                raise BadTarError(
                    f"{path}: expected a header or the end of the archive at byte {end}, found "
                    "a damaged header or bytes after the end"
                )
            num_zeros += len(piece)
    if num_zeros < 2 * BLOCK_BYTES:
        raise BadTarError(
            f"{path}: cut short: expected the two end-of-archive blocks at byte {end}, found "
            f"{num_zeros} bytes"
        )
