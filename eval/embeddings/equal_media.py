"""Items with identical contents, within a set and in two sets, found through their embeddings.

Equal contents have bitwise equal embeddings, so only items with such embeddings are read.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from eval.embeddings.items import ItemSet


@dataclass(frozen=True)
class EmbeddedItems:
    """A selection of the items of a set, and their embeddings."""

    source: ItemSet
    indices: Sequence[int]  # [n] items of the source
    embeddings: Tensor  # [n, D]


def number_contents(items: ItemSet, embeddings: Tensor) -> np.ndarray:
    """Numbers the distinct contents of items.

    Args:
        items: n items.
        embeddings: [n, D]

    Returns:
        int64 [n], from 0 without gaps; equal numbers are equal contents.

    Raises:
        InputError: if an item cannot be read.
    """
    rows = _rows(embeddings)
    counts = Counter(rows)
    contents = [
        row if counts[row] == 1 else row + items.digest(item) for item, row in enumerate(rows)
    ]
    number_of: dict[bytes, int] = {}
    return np.array([number_of.setdefault(content, len(number_of)) for content in contents])


def equal_media(first: EmbeddedItems, second: EmbeddedItems) -> tuple[np.ndarray, np.ndarray]:
    """Finds the items whose media file has the same bytes as that of an item of the other set.

    Returns:
        (positions in `first`, positions in `second`), ascending int64.

    Raises:
        InputError: if a media file cannot be read.
    """
    first_rows, second_rows = (_rows(each.embeddings) for each in (first, second))
    shared = set(first_rows) & set(second_rows)
    first_sums, second_sums = (
        _positions_by_digest(each, [position for position, row in enumerate(rows) if row in shared])
        for each, rows in ((first, first_rows), (second, second_rows))
    )
    equal = set(first_sums) & set(second_sums)
    found = (
        sorted(position for digest in equal for position in sums[digest])
        for sums in (first_sums, second_sums)
    )
    first_positions, second_positions = (np.array(each, dtype=np.int64) for each in found)
    return first_positions, second_positions


def _rows(embeddings: Tensor) -> list[bytes]:
    """Returns a digest of the bytes of each embedding."""
    values = np.ascontiguousarray(embeddings.cpu().numpy())
    return [hashlib.blake2b(row, digest_size=16).digest() for row in values]


def _positions_by_digest(items: EmbeddedItems, positions: Sequence[int]) -> dict[bytes, list[int]]:
    """Maps the digest of a content to the positions of the items that have it."""
    found: dict[bytes, list[int]] = defaultdict(list)
    for position in positions:
        found[items.source.digest(int(items.indices[position]))].append(position)
    return found
