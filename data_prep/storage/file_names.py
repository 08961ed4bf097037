"""File names from names that users choose."""

from __future__ import annotations

import re

MAX_NAME_BYTES = 180  # suffixes need the rest of the 255 bytes


def file_name_of(name: str) -> str:
    """Encodes a name as part of a file name; different names give different file names.

    Letters and digits of any script, "_" and "-" are kept. The bytes of other characters are
    written as %XX in UTF-8, so that `urllib.parse.unquote` returns the name.

    Raises:
        ValueError: if the name is empty, cannot be encoded, or is too long for a file name.
    """
    if not name:
        raise ValueError("expected a name, found an empty one")
    try:
        encoded = "".join(
            each if each.isalnum() or each in "_-" else _escaped(each) for each in name
        )
    except UnicodeEncodeError as error:
        raise ValueError(f"name {name!r}: {error}") from None
    num_bytes = len(encoded.encode())
    if num_bytes > MAX_NAME_BYTES:
        raise ValueError(
            f"name {name!r}: expected at most {MAX_NAME_BYTES} bytes as a file name, found "
            f"{num_bytes}; shorten it"
        )
    return encoded


def readable_part(name: str) -> str:
    """Returns a readable part of a file name; a hash next to it must tell names apart."""
    readable = re.sub(r"[^\w.-]", "_", name)[:60]
    return readable.encode()[:MAX_NAME_BYTES].decode(errors="ignore")


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode())
