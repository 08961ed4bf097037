"""Relevance judgements: pairs of a media item and a caption that match."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Relevance:
    """Matching pairs of a media item and a caption, as parallel arrays."""

    media: np.ndarray  # int64 [P]
    texts: np.ndarray  # int64 [P]

    def texts_of(self, item: int) -> np.ndarray:
        """Returns the captions that are relevant to a media item."""
        return self.texts[self.media == item]

    def media_of(self, text: int) -> np.ndarray:
        """Returns the media items that are relevant to a caption."""
        return self.media[self.texts == text]


def relevance_of_owners(media_of_text: np.ndarray) -> Relevance:
    """Pairs each caption with its own item only.

    Args:
        media_of_text: [M] item of each caption.
    """
    owners = np.asarray(media_of_text, dtype=np.int64)
    return Relevance(owners, np.arange(len(owners)))


def relevance_of_equal_captions(media_of_text: np.ndarray, captions: Sequence[str]) -> Relevance:
    """Pairs each caption with every item that has an identical caption.

    Args:
        media_of_text: [M] item of each caption.
        captions: [M] captions.
    """
    items_of: dict[str, set[int]] = {}
    for item, caption in zip(media_of_text, captions, strict=True):
        items_of.setdefault(caption, set()).add(int(item))
    return _sorted_relevance(
        (text, item) for text, caption in enumerate(captions) for item in items_of[caption]
    )


def relevance_of_equal_values(values: Sequence[str], other_values: Sequence[str]) -> Relevance:
    """Pairs the items of two datasets that have equal values.

    Args:
        values: [Q] value of each item of the first dataset.
        other_values: [M] value of each item of the second dataset, whose items act as captions.
    """
    items_of: dict[str, list[int]] = {}
    for item, value in enumerate(values):
        items_of.setdefault(value, []).append(item)
    return _sorted_relevance(
        (other, item) for other, value in enumerate(other_values) for item in items_of[value]
    )


def clusters_of_equal_values(relevance: Relevance) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the distinct values of the items of two datasets that match if values are equal.

    Args:
        relevance: pairs of `relevance_of_equal_values`; every item has a pair.

    Returns:
        ([Q], [M]) int64: number of each item's value, from 0 without gaps.
    """
    first_media = np.full(relevance.texts.max() + 1, np.iinfo(np.int64).max)
    np.minimum.at(first_media, relevance.texts, relevance.media)  # first item with the value
    of_media = np.zeros(relevance.media.max() + 1, dtype=np.int64)
    of_media[relevance.media] = first_media[relevance.texts]
    values, of_texts = np.unique(first_media, return_inverse=True)
    return np.searchsorted(values, of_media), of_texts


def _sorted_relevance(pairs: Iterable[tuple[int, int]]) -> Relevance:
    """Sorts (text, item) pairs by text."""
    texts, media = np.array(sorted(pairs), dtype=np.int64).T
    return Relevance(media, texts)
