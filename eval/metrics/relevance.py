"""Relevance judgements: pairs of a media item and a caption, or of items of two views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array, csr_array
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

    Raises:
        ValueError: if there are more than MAX_PAIRS pairs.
    """
    owners = np.asarray(media_of_text, dtype=np.int64)
    _, of_text = np.unique(np.array(captions, dtype=object), return_inverse=True)
    distinct = _incidence(owners, of_text)  # [Q, number of distinct captions]
    _check_num_pairs(int(distinct.sum(axis=0) @ np.bincount(of_text)))
    return _relevance(_incidence(np.arange(len(captions)), of_text) @ distinct.T)


def relevance_of_equal_values(values: Sequence[str], other_values: Sequence[str]) -> Relevance:
    """Pairs the items of two datasets that have equal values.

    Args:
        values: [Q] value of each item of the first dataset.
        other_values: [M] value of each item of the second dataset, whose items act as captions.

    Raises:
        ValueError: if there are more than MAX_PAIRS pairs.
    """
    both = np.array([*values, *other_values], dtype=object)
    _, numbers = np.unique(both, return_inverse=True)
    return _relevance_of_groups(numbers[: len(values)], numbers[len(values) :])


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
    # Pairs of items of one sample are matching pairs, and bound the cost of the first product.
    _check_num_pairs(_num_pairs_of_groups(left.samples, right.samples))
    of_left, of_right = (_incidence(side.samples, side.contents) for side in (left, right))
    together = of_left.T @ of_right  # [contents of left, contents of right]
    num_lefts, num_rights = (np.bincount(side.contents) for side in (left, right))
    _check_num_pairs(int(num_lefts @ (together @ num_rights)))
    lefts, rights = (
        _incidence(np.arange(len(side.contents)), side.contents) for side in (left, right)
    )
    return _relevance(rights @ together.T @ lefts.T)


def relevance_of_samples(left: SampleItems, right: SampleItems) -> Relevance:
    """Pairs the items of two views that belong to one sample; see `relevance_of_equal_contents`."""
    return _relevance_of_groups(left.samples, right.samples)


def _relevance_of_groups(of_items: np.ndarray, of_texts: np.ndarray) -> Relevance:
    """Pairs every item with every text of the same group: [Q], [M] numbers of groups"""
    _check_num_pairs(_num_pairs_of_groups(of_items, of_texts))
    num_groups = int(max(of_items.max(), of_texts.max())) + 1
    items, texts = (
        _incidence(np.arange(len(numbers)), numbers, num_columns=num_groups)
        for numbers in (of_items, of_texts)
    )
    return _relevance(texts @ items.T)


def _num_pairs_of_groups(of_items: np.ndarray, of_texts: np.ndarray) -> int:
    num_items, num_texts = np.bincount(of_items), np.bincount(of_texts)
    common = min(len(num_items), len(num_texts))
    return int(num_items[:common] @ num_texts[:common])


def _check_num_pairs(num_pairs: int) -> None:
    if num_pairs > MAX_PAIRS:
        raise ValueError(
            f"expected at most {MAX_PAIRS:,} matching pairs, found at least {num_pairs:,}: too "
            "many items are equal"
        )


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


def _incidence(
    rows: np.ndarray, columns: np.ndarray, *, num_columns: int | None = None
) -> csr_array:
    """Returns bool [max row + 1, num_columns], true at the given places; None: max column + 1."""
    if num_columns is None:
        num_columns = int(columns.max()) + 1
    values = np.ones(len(rows), dtype=bool)
    shape = (int(rows.max()) + 1, num_columns)
    return coo_array((values, (rows, columns)), shape=shape).tocsr()


def _relevance(matches: csr_array) -> Relevance:
    """Lists the pairs of bool [M, Q], sorted by text and then by item."""
    matches.sort_indices()
    texts = np.repeat(np.arange(matches.shape[0]), np.diff(matches.indptr))
    return Relevance(matches.indices.astype(np.int64), texts)
