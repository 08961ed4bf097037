"""Lines of text files, plain or compressed, at a path or URL."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from functools import partial
from typing import Any, BinaryIO

from data_prep.errors import InputError
from data_prep.sources.input_files import readable_input
from data_prep.storage import remote_file

MAX_LINE_CHARACTERS = 1 << 24
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
# First bytes -> compression
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}
BZIP2_BLOCK = b"1AY&SY"  # follows "BZh" and a digit; plain text may begin with the former


def read_lines(path: str, *, newline: str) -> Iterator[str]:
    """Yields the lines of a file, with their line endings. Compressed files are decompressed.

    Bytes that are not UTF-8 become lone surrogates.

    Args:
        path: path or URL.
        newline: as in `open`.

    Raises:
        InputError: if the file is unreadable, damaged, UTF-16 or a zip archive, or has a line of
            `MAX_LINE_CHARACTERS` or more.
    """
    with _readable_text(path), remote_file.open_binary(path) as packed:
        file = _decompressed(packed, path)
        if file.peek(2)[:2] in UTF16_MARKS:
            raise InputError(f"{path}: expected text in UTF-8, found UTF-16; save it as UTF-8")
        text = io.TextIOWrapper(
            file, encoding="utf-8-sig", errors="surrogateescape", newline=newline
        )
        for number, line in enumerate(iter(partial(text.readline, MAX_LINE_CHARACTERS), ""), 1):
            if len(line) == MAX_LINE_CHARACTERS:
                raise InputError(
                    f"{path}: line {number} has {MAX_LINE_CHARACTERS:,} characters or more; "
                    "expected a manifest with one pair per line"
                )
            yield line


def utf8_problem(value: Any) -> str | None:
    """Returns why a value of JSON, at any depth, is no text in UTF-8; None if it is."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return error.reason
    return None


@contextlib.contextmanager
def _readable_text(path: str) -> Iterator[None]:
    try:
        with readable_input(path):
            yield
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{path}: the compressed file is truncated or damaged ({error}); copy it again"
        ) from None


def _decompressed(file: BinaryIO, path: str) -> io.BufferedReader:
    start = file.peek(16)
    compression = next(
        (name for magic, name in COMPRESSIONS.items() if start.startswith(magic)), ""
    )
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=file))
    if compression == "bzip2" and start[4:10] == BZIP2_BLOCK:
        return io.BufferedReader(bz2.BZ2File(file))
    if compression == "xz":
        return io.BufferedReader(lzma.LZMAFile(file))
    if compression in ("zstd", "lz4"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(file, compression))
    if compression == "zip":
        raise InputError(f"{path}: expected a table, found a zip archive; unpack it")
    return file
