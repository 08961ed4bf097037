"""Undoing of a single flipped bit in content whose checksum is known.

Each bit is flipped back in turn until the checksum fits. A sha256 fits the original content alone.
The crc32 of a sealed row fits no other content that differs in one bit from the damaged one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

MAX_BYTES = 1 << 14  # of content that is searched: a few seconds


def single_flips(content: bytes) -> Iterator[bytes]:
    """Yields the content with each of its bits flipped."""
    flipped = bytearray(content)
    for place in range(len(content)):
        for bit in range(8):
            flipped[place] ^= 1 << bit
            yield bytes(flipped)
            flipped[place] ^= 1 << bit


def undo_flip(content: bytes, is_valid: Callable[[bytes], bool]) -> bytes | None:
    """Returns the valid content that differs in one bit; None if there is none."""
    if len(content) > MAX_BYTES:
        return None
    return next((flipped for flipped in single_flips(content) if is_valid(flipped)), None)


def undo_flip_by_sum(content: bytes, sha256: str, *, start: int) -> bytes | None:
    """Returns the content with this sha256 that differs in one bit after `start`, or None."""
    if len(content) - start > MAX_BYTES:
        return None
    before = hashlib.sha256(content[:start])
    for flipped in single_flips(content[start:]):
        whole = before.copy()
        whole.update(flipped)
        if whole.hexdigest() == sha256:
            return content[:start] + flipped
    return None
