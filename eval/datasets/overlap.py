"""Overlap between an evaluation set and training datasets, detected by four methods."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np
import pyarrow
import pyarrow.parquet
from tqdm import tqdm

from data_prep.config import NearMedia
from data_prep.dedup.near_audio import ClipWords, near_audio_pairs
from data_prep.dedup.near_images import ImageHashes, near_images
from data_prep.errors import InputError
from data_prep.media.audio_fingerprint import audio_fingerprint, words_of
from data_prep.media.decode import decode_audio, decode_image
from data_prep.media.image_fingerprint import image_fingerprint
from data_prep.shards.parquet import check_parquet_sum
from data_prep.shards.sample import (
    CorruptSampleError,
    media_extension_of,
)
from data_prep.shards.subset import KeptSamples
from eval.datasets.datasets import EvaluationSet
from eval.datasets.labels import texts_of

METHODS = ("key", "content", "near", "caption")
TRAIN_ROWS_AT_ONCE = 1 << 19
FINGERPRINT_RATE_HZ = 16_000
COLUMNS = ("key", "uid", "sha256", "captions", "source")
COLUMNS_OF_MEDIA = {
    "image": ("phash", "phash_mirrored", "signature"),
    "audio": ("fingerprint",),
}


@dataclass
class Overlap:
    """Items of an evaluation set, and their matches in training datasets."""

    keys: list[str]  # [Q] key of each item
    # (item, method, training dataset, training key, similarity)
    matches: list[tuple[int, str, str, str, float]] = field(default_factory=list)

    SCHEMA: ClassVar[pyarrow.Schema] = pyarrow.schema(
        [
            ("key", pyarrow.string()),  # key of the item in the evaluation set
            ("method", pyarrow.string()),
            ("train_dataset", pyarrow.string()),
            ("train_key", pyarrow.string()),
            ("similarity", pyarrow.float32()),  # 1 except for "near"
        ]
    )

    def rows(self) -> list[dict[str, Any]]:
        """Lists the matches, sorted by item."""
        names = self.SCHEMA.names
        return [
            dict(zip(names, (self.keys[item], *match), strict=True))
            for item, *match in sorted(self.matches)
        ]

    def counts(self) -> dict[str, Any]:
        """Returns the number of items matched by each method, and by any method."""
        items = {
            method: len({item for item, found, *_ in self.matches if found == method})
            for method in METHODS
        }
        return {"num_items": items | {"any": int(self.is_seen().sum()), "all": len(self.keys)}}

    def is_seen(self) -> np.ndarray:
        """Returns bool [Q]: whether each item has a match."""
        is_seen = np.zeros(len(self.keys), dtype=bool)
        is_seen[[item for item, *_ in self.matches]] = True
        return is_seen


@dataclass(frozen=True)
class _ItemIdentities:
    """Lookup tables that identify the items of the evaluation set; values are item indices."""

    names: list[str]  # [Q] sample key of each item
    keys: dict[str, list[int]]  # stem of the sample key -> items
    contents: dict[str, list[int]]  # SHA-256 of the media -> items
    captions: dict[str, list[int]]  # normalised caption -> items
    fingerprints: list[dict[str, Any]]  # [Q], or empty if near media are not compared


def find_overlap(
    dataset: EvaluationSet,
    train: Sequence[Path],
    *,
    near_media: NearMedia | None,
    keys: bool = True,
    captions: bool = True,
    workers: int = 1,
) -> Overlap:
    """Finds the items of an evaluation set that are also in training datasets.

    Args:
        dataset: evaluation set.
        train: folders of Isopair shards.
        near_media: thresholds for near-duplicate media; None: not compared.
        keys: whether equal file names or uids count as a match.
        captions: whether equal captions count as a match.
        workers: threads that compare images.

    Raises:
        InputError: if an item cannot be decoded, or a training dataset has no column files.
    """
    identities = _read_identities(
        dataset, with_captions=captions, with_fingerprints=near_media is not None
    )
    overlap = Overlap(identities.names)
    for folder in train:
        for table in _tables_of(folder, media=dataset.info.media):
            _match_texts(identities, table, folder, keys=keys, into=overlap)
            if near_media is not None:
                near = {"image": _near_images, "audio": _near_clips}[dataset.info.media]
                items, rows, similarity = near(
                    identities.fingerprints, table, near_media, workers=workers
                )
                train_keys = table["key"].take(rows).to_pylist() if len(rows) else []
                overlap.matches += [
                    (int(item), "near", str(folder), key, float(value))
                    for item, key, value in zip(items, train_keys, similarity, strict=True)
                ]
    return overlap


def _read_identities(
    dataset: EvaluationSet, *, with_captions: bool, with_fingerprints: bool
) -> _ItemIdentities:
    found = _ItemIdentities([], defaultdict(list), defaultdict(list), defaultdict(list), [])
    kind = dataset.info.media
    for item in tqdm(range(len(dataset)), desc=f"reading {dataset.folder}", disable=None):
        try:
            sample = dataset.read_sample(item)
        except (CorruptSampleError, OSError) as error:
            raise InputError(str(error)) from None
        extension = media_extension_of(sample.members, kind)
        if extension is None:
            raise InputError(f"{sample}: contains no {kind}")
        content = sample.members[extension]
        found.names.append(sample.key)
        found.keys[PurePosixPath(sample.key).stem].append(item)
        found.contents[hashlib.sha256(content).hexdigest()].append(item)
        if with_captions and {"txt", "json"} & set(sample.members):
            for caption in _captions_or_none(sample, dataset):
                found.captions[_normalized(caption)].append(item)
        if with_fingerprints:
            found.fingerprints.append(_fingerprint(content, extension, kind))
    return found


def _captions_or_none(sample: Any, dataset: EvaluationSet) -> list[str]:
    try:
        return texts_of(sample, dataset)
    except InputError:  # a classification set has no captions
        return []


def _normalized(caption: str) -> str:
    return " ".join(caption.casefold().split())


def _fingerprint(content: bytes, extension: str, kind: str) -> dict[str, Any]:
    if kind == "image":
        return image_fingerprint(decode_image(content, extension))
    waveform = decode_audio(content, sample_rate_hz=FINGERPRINT_RATE_HZ)
    return audio_fingerprint(waveform, FINGERPRINT_RATE_HZ)


def _tables_of(folder: Path, *, media: str) -> Iterator[pyarrow.Table]:
    """Yields tables of a training dataset's columns, of at least TRAIN_ROWS_AT_ONCE rows each.

    Raises:
        InputError: if the dataset holds another kind of media, or a shard has no columns.
    """
    samples = KeptSamples(folder, subset=None)
    if samples.info.media != media:
        raise InputError(
            f"{folder}: expected {media}, as in the evaluation set, found {samples.info.media}"
        )
    wanted = [*COLUMNS, *COLUMNS_OF_MEDIA[media]]
    waiting: list[pyarrow.Table] = []
    for row in tqdm(samples.dataset.manifest, desc=f"comparing {folder}", disable=None):
        path = folder / f"{row.name}.parquet"
        if not path.exists():
            raise InputError(
                f"{path}: expected the columns of the shard, found no file; create it with "
                "python -m data_prep.index_shards"
            )
        check_parquet_sum(path, row)
        waiting.append(pyarrow.parquet.read_table(path, columns=wanted))
        if sum(map(len, waiting)) >= TRAIN_ROWS_AT_ONCE:
            yield pyarrow.concat_tables(waiting)
            waiting = []
    if waiting:
        yield pyarrow.concat_tables(waiting)


def _match_texts(
    identities: _ItemIdentities, table: pyarrow.Table, folder: Path, *, keys: bool, into: Overlap
) -> None:
    columns = {name: table[name].to_pylist() for name in COLUMNS}
    for row, key in enumerate(columns["key"]):
        names = set()
        if keys:
            source = columns["source"][row]
            names = {columns["uid"][row], PurePosixPath(source).stem if source else None} - {None}
        sha256 = columns["sha256"][row]
        captions = map(_normalized, columns["captions"][row] or [])
        found = [("key", item) for name in names for item in identities.keys.get(name, ())]
        found += [("content", item) for item in identities.contents.get(sha256, ())]
        found += [
            ("caption", item) for text in captions for item in identities.captions.get(text, ())
        ]
        into.matches += [
            (item, method, str(folder), key, 1.0) for method, item in dict.fromkeys(found)
        ]


def _near_images(
    fingerprints: Sequence[dict[str, Any]],
    table: pyarrow.Table,
    near_media: NearMedia,
    *,
    workers: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (items, rows of the table, similarity) of near-duplicate images."""
    train_rows = np.flatnonzero(table["phash"].is_valid().to_numpy())
    train = table.take(train_rows)
    own = {
        name: [each[name] for each in fingerprints] + train[name].to_pylist()
        for name in COLUMNS_OF_MEDIA["image"]
    }
    signatures = np.stack([np.frombuffer(each, np.uint8) for each in own["signature"]])
    hashes = ImageHashes(
        np.array(own["phash"], np.uint64), np.array(own["phash_mirrored"], np.uint64), signatures
    )
    num_items = len(fingerprints)
    is_reference = np.arange(len(signatures)) >= num_items
    matches = near_images(
        hashes,
        is_reference=is_reference,
        max_distance=near_media.image_max_distance,
        min_similarity=near_media.image_min_similarity,
        matches_mirrored=near_media.mirrored,
        workers=workers,
    )
    first = np.concatenate([matches.left, matches.member_firsts])
    second = np.concatenate([matches.right, matches.members])
    similarity = np.concatenate([matches.similarity, matches.member_similarity])
    items, rows = np.minimum(first, second), np.maximum(first, second)
    is_pair = (items < num_items) & (rows >= num_items)
    return items[is_pair], train_rows[rows[is_pair] - num_items], similarity[is_pair]


def _near_clips(
    fingerprints: Sequence[dict[str, Any]],
    table: pyarrow.Table,
    near_media: NearMedia,
    *,
    workers: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns (items, rows of the table, similarity) of near-duplicate audio clips.

    `workers` is unused: the comparison runs in one thread.
    """
    num_items = len(fingerprints)
    contents = [each["fingerprint"] for each in fingerprints]
    contents += [each or b"" for each in table["fingerprint"].to_pylist()]
    words = [words_of(each) for each in contents]
    starts = np.cumsum([0, *map(len, words)])
    first, second, similarity = near_audio_pairs(
        ClipWords(np.concatenate(words), starts),
        min_similarity=near_media.audio_min_similarity,
        num_queries=num_items,
    )
    is_pair = (first < num_items) & (second >= num_items)
    return first[is_pair], second[is_pair] - num_items, similarity[is_pair]
