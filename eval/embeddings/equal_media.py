"""Items of two evaluation sets with identical media files, found through their embeddings."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from data_prep.errors import InputError
from data_prep.shards.sample import CorruptSampleError, media_extension_of, media_kind_of
from eval.datasets.datasets import EvaluationSet


@dataclass(frozen=True)
class EmbeddedItems:
    """Items of a set and their embeddings."""

    dataset: EvaluationSet
    ordinals: Sequence[int]  # [n] indices of the items in the dataset
    embeddings: Tensor  # [n, D]


def equal_media(first: EmbeddedItems, second: EmbeddedItems) -> tuple[np.ndarray, np.ndarray]:
    """Finds the items whose media file has the same bytes as that of an item of the other set.

    Equal files have bitwise equal embeddings, so only items with such embeddings are read.

    Returns:
        (positions in `first`, positions in `second`), ascending int64.

    Raises:
        InputError: if a media file cannot be read.
    """
    first_rows, second_rows = (_rows(each.embeddings) for each in (first, second))
    shared = set(first_rows) & set(second_rows)
    first_sums, second_sums = (
        _positions_by_checksum(
            each, [position for position, row in enumerate(rows) if row in shared]
        )
        for each, rows in ((first, first_rows), (second, second_rows))
    )
    equal = set(first_sums) & set(second_sums)
    found = (
        sorted(position for checksum in equal for position in sums[checksum])
        for sums in (first_sums, second_sums)
    )
    first_positions, second_positions = (np.array(each, dtype=np.int64) for each in found)
    return first_positions, second_positions


def _rows(embeddings: Tensor) -> list[bytes]:
    """Returns a digest of the bytes of each embedding."""
    values = np.ascontiguousarray(embeddings.cpu().numpy())
    return [hashlib.blake2b(row, digest_size=16).digest() for row in values]


def _positions_by_checksum(
    items: EmbeddedItems, positions: Sequence[int]
) -> dict[bytes, list[int]]:
    """Maps the SHA-256 of a media file to the positions of the items that have it."""
    kind = items.dataset.info.media
    fields = [name for name in items.dataset.info.fields if media_kind_of(name) == kind]
    found: dict[bytes, list[int]] = defaultdict(list)
    for position in positions:
        try:
            sample = items.dataset.read_sample(int(items.ordinals[position]), fields=fields)
        except (CorruptSampleError, OSError) as error:
            raise InputError(str(error)) from None
        extension = media_extension_of(sample.members, kind)
        found[hashlib.sha256(sample.members[extension]).digest()].append(position)
    return found
