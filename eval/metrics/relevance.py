"""Which captions are right for which media items."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Relevance:
    """Pairs of a media item and a caption that is right for it."""

    media: np.ndarray  # int64 [P]
    texts: np.ndarray  # int64 [P]

    def texts_of(self, item: int) -> np.ndarray:
        """Captions that are right for a media item."""
        return self.texts[self.media == item]

    def media_of(self, text: int) -> np.ndarray:
        """Media items that a caption is right for."""
        return self.media[self.texts == text]


def relevance_of_owners(media_of_text: np.ndarray) -> Relevance:
    """Each caption is right for the item that it belongs to, and for no other.

    Args:
        media_of_text: [M] item of each caption.
    """
    owners = np.asarray(media_of_text, dtype=np.int64)
    return Relevance(owners, np.arange(len(owners)))


def relevance_of_equal_captions(media_of_text: np.ndarray, captions: Sequence[str]) -> Relevance:
    """Each caption is right for all items that have a caption of the same words, and its own first.

    Args:
        media_of_text: [M] item of each caption.
        captions: [M]
    """
    items_of: dict[str, set[int]] = {}
    for item, caption in zip(media_of_text, captions, strict=True):
        items_of.setdefault(caption, set()).add(int(item))
    return _sorted_pairs(
        (text, item) for text, caption in enumerate(captions) for item in items_of[caption]
    )


def relevance_of_equal_values(values: Sequence[str], other_values: Sequence[str]) -> Relevance:
    """Items of two datasets are right for each other if their values are equal.

    Args:
        values: [Q] of the items of the one.
        other_values: [M] of those of the other, which take the place of captions.
    """
    items_of: dict[str, list[int]] = {}
    for item, value in enumerate(values):
        items_of.setdefault(value, []).append(item)
    return _sorted_pairs(
        (other, item) for other, value in enumerate(other_values) for item in items_of[value]
    )


def _sorted_pairs(pairs: Iterable[tuple[int, int]]) -> Relevance:
    """Of (text, item)."""
    texts, media = np.array(sorted(pairs), dtype=np.int64).T
    return Relevance(media, texts)
