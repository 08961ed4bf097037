"""Which captions are right for which media items."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RightPairs:
    """Pairs of a media item and a caption that is right for it."""

    media: np.ndarray  # int64 [P]
    texts: np.ndarray  # int64 [P]

    def texts_of(self, item: int) -> np.ndarray:
        """Captions that are right for a media item."""
        return self.texts[self.media == item]

    def media_of(self, text: int) -> np.ndarray:
        """Media items that a caption is right for."""
        return self.media[self.texts == text]


def pairs_of_owners(media_of_text: np.ndarray) -> RightPairs:
    """Each caption is right for the item that it belongs to, and for no other.

    Args:
        media_of_text: [M] item of each caption.
    """
    owners = np.asarray(media_of_text, dtype=np.int64)
    return RightPairs(owners, np.arange(len(owners)))


def pairs_of_equal_captions(media_of_text: np.ndarray, captions: Sequence[str]) -> RightPairs:
    """Each caption is right for all items that have a caption of the same words, and its own first.

    Args:
        media_of_text: [M] item of each caption.
        captions: [M]
    """
    texts_of: dict[str, list[int]] = {}
    for text, caption in enumerate(captions):
        texts_of.setdefault(caption, []).append(text)
    pairs = {
        (text, int(media_of_text[other]))
        for texts in texts_of.values()
        for text in texts
        for other in texts
    }
    texts, media = np.array(sorted(pairs), dtype=np.int64).T
    return RightPairs(media, texts)
