"""Sealed files, which hold a checksum of their own content, so that every damage is detected.

    JSON object     one more key at its end, "sha256", over the canonical form of the other keys
    row of .jsonl   one more key at its end, "crc32", over the characters before it
    YAML            one more line at its start, a comment, with the sha256 of the lines below

Earlier versions wrote files without a seal. A file counts as one of theirs only if nothing in it
resembles a seal, so that no damage to a seal removes it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import zlib
from collections.abc import Collection, Mapping
from datetime import datetime
from functools import lru_cache
from types import NoneType, UnionType
from typing import Any, NoReturn, get_args, get_origin

SEAL = "sha256"
ROW_SEAL_KEY = "crc32"
ROW_SEAL = re.compile(rb'(\{.*), "crc32": "([0-9a-f]{8})"\}')
# Also a damaged seal has this form. No row without a seal does.
ROW_SEAL_FORM = re.compile(rb'.*, ".{5}": ".{8}"\}')
YAML_SEAL = re.compile(rb"# sha256 of the lines below: ([0-9a-f]{64})\n")
YAML_SEAL_REMAINS = re.compile(rb"[^\n]*[0-9a-f]{31}")
LONGEST_SHOWN = 80  # characters of a value in a message


class DamagedFileError(ValueError):
    """A file is not readable or not as it was written; the message says why, without the path."""


# ------------------------------------------------------------------------------------ JSON objects


def to_sealed_json(values: Mapping[str, Any], *, indent: int) -> bytes:
    """Formats an object as sealed JSON."""
    plain = json.loads(json.dumps(values, allow_nan=False))  # as a reader finds it
    return json.dumps(plain | {SEAL: _sum_of(plain)}, indent=indent).encode() + b"\n"


def read_sealed_json(
    content: bytes, *, unsealed_keys: Collection[str]
) -> tuple[dict[str, Any], bool]:
    """Reads an object, and verifies its seal.

    Args:
        content: content of the file.
        unsealed_keys: the keys that an object without a seal may have.

    Returns:
        (the object without its seal, whether it has one)

    Raises:
        DamagedFileError: if the content is damaged.
    """
    values = parse_object(content)
    if SEAL not in values:
        unknown = sorted(values.keys() - set(unsealed_keys))
        if unknown:
            raise DamagedFileError(
                f"expected its checksum under the key {SEAL!r}, found {_shown(unknown[0])}"
            )
        return values, False
    expected, found = values.pop(SEAL), _sum_of(values)
    if found != expected:
        raise DamagedFileError(
            f"expected the recorded sha256 of its content, {_shown(expected)}, found {found}"
        )
    return values, True


def parse_object(content: bytes, *, allows_nan: bool = False) -> dict[str, Any]:
    """Parses a JSON object strictly: UTF-8, no duplicate keys.

    Raises:
        DamagedFileError: if the content is anything else.
    """
    constants = {} if allows_nan else {"parse_constant": _refuse_constant}
    try:
        values = json.loads(content.decode(), object_pairs_hook=_without_duplicates, **constants)
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"expected JSON: {error}") from None
    if not isinstance(values, dict):
        raise DamagedFileError(f"expected a JSON object, found {_shown(values)}")
    return values


def _sum_of(values: Mapping[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("duplicate key")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"found {name}, which is not JSON")


# -------------------------------------------------------------------------------- rows of .jsonl


def to_sealed_row(row: Mapping[str, Any]) -> str:
    """Formats a row, which must not be empty, as a line of sealed .jsonl."""
    text = json.dumps(row).removesuffix("}")
    return f'{text}, "crc32": "{zlib.crc32(text.encode()):08x}"}}\n'


def read_sealed_row(line: bytes) -> dict[str, Any]:
    """Reads a row without its seal, after verifying it.

    Args:
        line: line of a .jsonl file, without its end.

    Raises:
        DamagedFileError: if the line is damaged.
    """
    sealed = ROW_SEAL.fullmatch(line)
    if sealed is None:
        row = parse_object(line, allows_nan=True)
        if ROW_SEAL_KEY in row or ROW_SEAL_FORM.fullmatch(line):
            raise DamagedFileError('expected a row that ends in its "crc32"')
        return row
    text, expected = sealed.groups()
    found = f"{zlib.crc32(text):08x}".encode()
    if found != expected:
        raise DamagedFileError(
            f"expected the recorded crc32 of the row, {expected.decode()}, found {found.decode()}"
        )
    return parse_object(text + b"}", allows_nan=True)


# ------------------------------------------------------------------------------------------ YAML


def to_sealed_yaml(text: str) -> bytes:
    """Adds a seal to YAML, in a comment."""
    content = text.encode()
    return b"# sha256 of the lines below: %s\n" % hashlib.sha256(content).hexdigest().encode() + (
        content
    )


def has_valid_seal(content: bytes) -> bool | None:
    """Verifies the seal of a YAML file; returns None if it has none."""
    seal = YAML_SEAL.match(content)
    if seal is None:
        return False if YAML_SEAL_REMAINS.match(content) else None
    return hashlib.sha256(content[seal.end() :]).hexdigest().encode() == seal.group(1)


# ------------------------------------------------------------------------------------------ checks


def check_types(
    values: Mapping[str, Any], types: Mapping[str, Any], *, optional: Collection[str] = ()
) -> None:
    """Checks the types of an object's values, strictly: True is no integer.

    Args:
        values: the object.
        types: key -> type, such as int, float, list[str], dict[str, int] or int | None.
        optional: keys that may be missing.

    Raises:
        DamagedFileError: naming the first key that is missing or whose value has another type.
    """
    for key, kind in types.items():
        if key not in values:
            if key not in optional:
                raise DamagedFileError(f"expected the key {key!r}, found none")
        elif not _is_of_type(values[key], kind):
            name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else kind
            raise DamagedFileError(f"{key}: expected {name}, found {_shown(values[key])}")


def check_time(value: str, *, key: str) -> None:
    """Checks that a value is a time with its zone.

    Raises:
        DamagedFileError: if it is not.
    """
    try:
        is_zoned = datetime.fromisoformat(value).tzinfo is not None
    except ValueError:
        is_zoned = False
    if not is_zoned:
        raise DamagedFileError(f"{key}: expected a time in UTC, found {value!r}")


def _is_of_type(value: Any, kind: Any) -> bool:
    if isinstance(kind, UnionType):
        return any(_is_of_type(value, each) for each in get_args(kind))
    if get_origin(kind) is list:
        return type(value) is list and all(_is_of_type(v, get_args(kind)[0]) for v in value)
    if get_origin(kind) is dict:
        of_values = get_args(kind)[1]
        return type(value) is dict and all(_is_of_type(v, of_values) for v in value.values())
    return type(value) in ((int, float) if kind is float else (kind or NoneType,))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


@lru_cache(maxsize=1000)
def warn_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning, only once in this process: a start reads the same file several times."""
    logger.warning("%s", message)
