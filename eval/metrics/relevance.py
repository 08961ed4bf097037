"""Relevance judgements: pairs of a media item and a caption, or of items of two views."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

MAX_PAIRS = 100_000_000  # matching pairs that fit into memory


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


@dataclass(frozen=True)
class SampleItems:
    """Items of one view of the samples of a dataset."""

    samples: np.ndarray  # int64 [n] sample of each item
    contents: np.ndarray  # int64 [n] number of each item's content, from 0 without gaps


def relevance_of_equal_contents(left: SampleItems, right: SampleItems) -> Relevance:
    """Pairs the items of two views whose contents occur together in some sample.

    An item thus matches those of its own sample, and those of every sample with an equal item.

    Args:
        left: Q items of the first view.
        right: M items of the second view, which act as captions.

    Raises:
        ValueError: if there are more than MAX_PAIRS pairs.
    """
    together = {
        (one, other)
        for ones, others in zip(*_contents_by_sample(left, right), strict=True)
        for one in ones
        for other in others
    }
    lefts, rights = (_rows_by_number(side.contents) for side in (left, right))
    return _all_pairs([(lefts[one], rights[other]) for one, other in together])


def relevance_of_samples(left: SampleItems, right: SampleItems) -> Relevance:
    """Pairs the items of two views that belong to one sample; see `relevance_of_equal_contents`."""
    lefts, rights = (_rows_by_number(side.samples) for side in (left, right))
    return _all_pairs(list(zip(lefts, rights, strict=True)))


def _all_pairs(groups: Sequence[tuple[np.ndarray, np.ndarray]]) -> Relevance:
    """Pairs every item with every text of the same group, sorted by text."""
    num_pairs = sum(len(items) * len(texts) for items, texts in groups)
    if num_pairs > MAX_PAIRS:
        raise ValueError(
            f"expected at most {MAX_PAIRS:,} matching pairs, found {num_pairs:,}: too many items "
            "are equal"
        )
    media = np.concatenate([np.tile(items, len(texts)) for items, texts in groups])
    texts = np.concatenate([np.repeat(texts, len(items)) for items, texts in groups])
    order = np.lexsort((media, texts))
    return Relevance(media[order], texts[order])


def clusters_of_equal_contents(
    left: SampleItems, right: SampleItems
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers the groups of samples that are linked by equal items of either view.

    Returns:
        ([Q], [M]) int64: group of each item, from 0 without gaps.
    """
    num_samples, num_lefts, num_rights = (
        int(numbers.max()) + 1 for numbers in (left.samples, left.contents, right.contents)
    )
    links = np.concatenate([left.contents, right.contents + num_lefts]) + num_samples
    samples = np.concatenate([left.samples, right.samples])
    num_nodes = num_samples + num_lefts + num_rights
    graph = coo_array((np.ones(len(links)), (samples, links)), shape=(num_nodes, num_nodes))
    _, groups = connected_components(graph, directed=False)
    _, of_sample = np.unique(groups[:num_samples], return_inverse=True)
    return of_sample[left.samples], of_sample[right.samples]


def _contents_by_sample(*sides: SampleItems) -> list[list[list[int]]]:
    """Lists the contents of each sample, for each side."""
    found = []
    for side in sides:
        of_sample = _rows_by_number(side.samples)
        found.append([np.unique(side.contents[rows]).tolist() for rows in of_sample])
    return found


def _rows_by_number(numbers: np.ndarray) -> list[np.ndarray]:
    """Returns the indices of each number, which are numbered from 0 without gaps."""
    order = np.argsort(numbers, kind="stable")
    return np.split(order, np.cumsum(np.bincount(numbers))[:-1])


def _sorted_relevance(pairs: Iterable[tuple[int, int]]) -> Relevance:
    """Sorts (text, item) pairs by text."""
    texts, media = np.array(sorted(pairs), dtype=np.int64).T
    return Relevance(media, texts)
