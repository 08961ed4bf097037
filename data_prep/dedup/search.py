"""Search methods of find_duplicates.

Each method takes the remaining samples and returns pairs of their numbers (see
data_prep.dedup.joined_datasets). Samples that lack a required column are skipped with a warning. A
dataset in which all samples lack it is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.config import NearCaptions, NearMedia, Semantic
from data_prep.dedup.embeddings import read_embeddings
from data_prep.dedup.groups import Pairs
from data_prep.dedup.joined_datasets import (
    MEASURE_ADVICE,
    JoinedDatasets,
    binary_column,
    number_column,
)
from data_prep.dedup.minhash import near_caption_pairs, read_shingles
from data_prep.dedup.near_audio import ClipWords, near_audio_pairs
from data_prep.dedup.near_images import ImageHashes, near_images
from data_prep.dedup.semantic import semantic_pairs
from data_prep.errors import InputError
from data_prep.media.image_fingerprint import SIGNATURE_BYTES

log = logging.getLogger(__name__)

SHA256_DIGITS = 64


@dataclass(frozen=True)
class Found:
    """The result of one method."""

    pairs: Pairs
    rank: np.ndarray | None = None  # float32 [samples]; a group keeps the lowest. None: not ranked


@dataclass(frozen=True)
class Search:
    """The samples to compare, and resource limits."""

    datasets: JoinedDatasets
    is_remaining: np.ndarray  # bool [samples], the remaining samples
    folder: Path  # for temporary files
    memory_gb: float
    workers: int


def find_exact(search: Search) -> Found:
    """Finds samples with equal media by sha256, and pairs each with the first equal sample.

    Raises:
        InputError: if a dataset has no hashes.
    """
    keys, has_key = _sha256_keys(search.datasets)
    sample = _samples_with(search, has_key, column="sha256")
    keys = keys[sample]
    order = np.lexsort((sample, keys[:, 1], keys[:, 0]))
    is_repeated = (keys[order][1:] == keys[order][:-1]).all(axis=1)
    lead = np.arange(len(order))
    lead[1:][is_repeated] = 0
    lead = np.maximum.accumulate(lead)  # index of the first element of each run
    repeated = np.flatnonzero(is_repeated) + 1
    first, second = sample[order[lead[repeated]]], sample[order[repeated]]
    has_query = first < search.datasets.num_queries
    ones = np.ones(int(has_query.sum()), np.float32)
    return Found(Pairs(first[has_query], second[has_query], ones))


def _sha256_keys(datasets: JoinedDatasets) -> tuple[np.ndarray, np.ndarray]:
    """Returns (half of each sha256, uint64 [samples, 2]; whether it exists, bool [samples])."""
    keys, has_key = [np.empty((0, 2), np.uint64)], [np.empty(0, dtype=bool)]
    for _, table in datasets.tables(["sha256"]):
        column = table["sha256"]
        digits = "".join(column.fill_null("0" * SHA256_DIGITS).to_pylist())
        sums = np.frombuffer(bytes.fromhex(digits), np.uint64).reshape(-1, 4)
        keys.append(sums[:, :2])
        has_key.append(column.is_valid().to_numpy())
    return np.concatenate(keys), np.concatenate(has_key)


def find_near_media(search: Search, options: NearMedia) -> Found:
    """Finds near-duplicate images or audio clips by their fingerprints.

    Raises:
        InputError: if a dataset has no fingerprints.
    """
    by_media = {"image": _near_images, "audio": _near_audio}
    if search.datasets.media not in by_media:
        raise InputError(
            f"{search.datasets.folders[0]}: modality {search.datasets.compared[0]} is of kind "
            f"{search.datasets.media}, which near_media cannot compare; set near_media to null"
        )
    return Found(by_media[search.datasets.media](search, options))


def _near_images(search: Search, options: NearMedia) -> Pairs:
    phash, has_phash = number_column(search.datasets, "phash")
    mirrored, _ = number_column(search.datasets, "phash_mirrored")
    sample = _samples_with(search, has_phash, column="phash")
    content, starts, _ = binary_column(
        search.datasets,
        "signature",
        samples=_mask(sample, len(search.is_remaining)),
        path=search.folder / "signatures.bin",
    )
    if (np.diff(starts) != SIGNATURE_BYTES).any():
        raise InputError(
            f"{search.datasets.folders[0]}: expected a signature of {SIGNATURE_BYTES} bytes for "
            f"each phash, found signatures of a different version; {MEASURE_ADVICE}"
        )
    hashes = ImageHashes(
        # Without shards, the type of the empty column is unknown.
        phash=phash[sample].astype(np.uint64),
        phash_mirrored=mirrored[sample].astype(np.uint64),
        signatures=content.reshape(-1, SIGNATURE_BYTES),
    )
    matches = near_images(
        hashes,
        is_reference=sample >= search.datasets.num_queries,
        max_distance=options.image_max_distance,
        min_similarity=options.image_min_similarity,
        matches_mirrored=options.mirrored,
        workers=search.workers,
    )
    return Pairs(
        sample[np.concatenate([matches.left, matches.member_firsts])],
        sample[np.concatenate([matches.right, matches.members])],
        np.concatenate([matches.similarity, matches.member_similarity]).astype(np.float32),
    )


def _near_audio(search: Search, options: NearMedia) -> Pairs:
    content, starts, has_fingerprint = binary_column(
        search.datasets,
        "fingerprint",
        samples=search.is_remaining,
        path=search.folder / "fingerprints.bin",
    )
    _check_measured(search.datasets, has_fingerprint, column="fingerprint")
    sample = np.flatnonzero(search.is_remaining)
    first, second, similarity = near_audio_pairs(
        ClipWords(content.view("<u4"), starts // 4),
        min_similarity=options.audio_min_similarity,
        num_queries=_num_queries(search, sample),
        memory_bytes=int(search.memory_gb * 2**29),
    )
    return Pairs(sample[first], sample[second], similarity)


def find_near_captions(search: Search, options: NearCaptions) -> Found:
    """Finds samples that share a near-duplicate caption."""
    counts: list[np.ndarray] = []
    sets = read_shingles(
        _caption_batches(search, counts),
        search.folder,
        shingle_words=options.shingle_words,
        permutations=options.permutations,
    )
    sample = np.repeat(
        np.flatnonzero(search.is_remaining), np.concatenate([np.empty(0, int), *counts])
    )
    first, second, similarity = near_caption_pairs(
        sets, min_jaccard=options.min_jaccard, num_queries=_num_queries(search, sample)
    )
    first, second = sample[first], sample[second]
    is_other = first != second  # captions of one sample may be similar
    return Found(Pairs(first[is_other], second[is_other], similarity[is_other]))


def _caption_batches(search: Search, counts: list[np.ndarray]) -> Iterator[list[str]]:
    """Yields the captions of the remaining samples, and appends their numbers to `counts`."""
    import pyarrow
    import pyarrow.compute

    for start, table in search.datasets.tables(["captions"]):
        chosen = pyarrow.array(search.is_remaining[start : start + table.num_rows])
        column = table["captions"].filter(chosen)
        counts.append(pyarrow.compute.list_value_length(column).fill_null(0).to_numpy())
        yield pyarrow.compute.list_flatten(column).fill_null("").to_pylist()


def find_semantic(search: Search, options: Semantic, *, seed: int) -> Found:
    """Finds samples with semantically equal media by cosine similarity of their embeddings.

    Args:
        search: samples to compare.
        options: folders of embeddings and thresholds.
        seed: seed of k-means.

    Raises:
        InputError: if embeddings are missing or unfinished, or do not belong to the datasets.
    """
    embeddings, sample = read_embeddings(
        search.datasets,
        [*options.embeddings, *options.against_embeddings],
        is_remaining=search.is_remaining,
        path=search.folder / "embeddings.bin",
    )
    pairs, cosine = semantic_pairs(
        embeddings,
        min_cosine=options.min_cosine,
        samples_per_cluster=options.samples_per_cluster,
        seed=seed,
        num_queries=_num_queries(search, sample),
        across_clusters=options.across_clusters,
    )
    rank = np.zeros(len(search.is_remaining), np.float32)
    rank[sample] = cosine
    return Found(Pairs(sample[pairs.first], sample[pairs.second], pairs.similarity), rank)


def _samples_with(search: Search, has_value: np.ndarray, *, column: str) -> np.ndarray:
    """Returns the remaining samples with a value in a column, int64 [n]."""
    _check_measured(search.datasets, has_value, column=column)
    return np.flatnonzero(search.is_remaining & has_value)


def _check_measured(datasets: JoinedDatasets, has_value: np.ndarray, *, column: str) -> None:
    """Checks that every dataset has values in a column, and warns about missing values.

    Args:
        datasets: datasets of the samples.
        has_value: bool [samples], whether the value is not null.
        column: name of the column.

    Raises:
        InputError: if a dataset has samples, but no values.
    """
    for number, folder in enumerate(datasets.folders):
        part = has_value[datasets.starts[number] : datasets.starts[number + 1]]
        is_pair = datasets.modalities[number].is_pair
        if len(part) and not part.any():
            raise InputError(
                f"{folder}: expected Parquet files with values in the column {column}, found none; "
                f"{MEASURE_ADVICE}"
            )
        if not part.all() and not is_pair:
            log.info(
                "%s: %s of %s samples have no %s %s and are skipped",
                folder,
                f"{len(part) - part.sum():,}",
                f"{len(part):,}",
                datasets.compared[number],
                column,
            )
        elif not part.all():
            log.warning(
                "%s: %s of %s samples have no %s and are skipped; %s",
                folder,
                f"{len(part) - part.sum():,}",
                f"{len(part):,}",
                column,
                MEASURE_ADVICE,
            )


def _num_queries(search: Search, sample: np.ndarray) -> int:
    """Counts the query samples among samples in ascending order."""
    return int(np.searchsorted(sample, search.datasets.num_queries))


def _mask(samples: np.ndarray, num: int) -> np.ndarray:
    mask = np.zeros(num, dtype=bool)
    mask[samples] = True
    return mask
