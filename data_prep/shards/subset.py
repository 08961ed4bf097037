"""Subset of a dataset, stored as one bit per sample; no shard is rewritten.

A `.subset` file is, little-endian:

    8 bytes               magic b"ISOSUB1\\n"
    uint32                length of the header in bytes, a multiple of 4
    header                JSON, padded with spaces: dataset_fingerprint, num_samples, num_kept,
                          fingerprint, preparation
    uint8 [(n + 7) // 8]  bit n % 8 of byte n // 8: whether sample n of the dataset is kept

A sample has two numbers. Its *ordinal* is its index in the whole dataset, and identifies it. Its
*rank* is its index among the kept samples. Conversion in either direction needs no list of samples.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.shards.manifest import DatasetInfo
from data_prep.shards.sample import BadShardError, Sample
from data_prep.shards.sample_contents import SampleContents
from data_prep.storage.atomic import write_atomically

SUBSET_MAGIC = b"ISOSUB1\n"
BLOCK_BYTES = 64  # cumulative counts are stored per block of 512 samples
# [256, 8]: position of the n-th set bit in a byte.
_POSITION_IN_BYTE = np.argsort(
    1 - np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    axis=1,
    kind="stable",
)
QUERIES_AT_ONCE = 16384  # limits the memory use of a search


@dataclass(frozen=True, eq=False)
class Subset:
    """The samples of a dataset that are kept.

    Equal selections from equal data have equal fingerprints, regardless of their preparation.
    """

    dataset_fingerprint: str
    num_samples: int  # number of samples in the whole dataset
    bits: np.ndarray  # uint8 [(num_samples + 7) // 8]
    preparation: dict[str, Any] = field(default_factory=dict)  # command and settings
    path: Path | None = None  # file from which the subset was read

    @classmethod
    def from_bitmap(
        cls, info: DatasetInfo, bitmap: np.ndarray, *, preparation: dict[str, Any]
    ) -> Subset:
        """Builds a subset from one boolean per sample.

        Args:
            info: description of the whole dataset.
            bitmap: bool [num_samples], by ordinal; True keeps the sample.
            preparation: JSON-serializable record of the command and settings.
        """
        assert bitmap.shape == (info.num_samples,) and bitmap.dtype == bool
        bits = np.packbits(bitmap, bitorder="little")
        return cls(info.fingerprint, info.num_samples, bits, preparation)

    # ------------------------------------------------------------------------------------ files

    def write(self, path: Path) -> None:
        """Writes the file atomically."""
        values = {
            "dataset_fingerprint": self.dataset_fingerprint,
            "num_samples": self.num_samples,
            "num_kept": self.num_kept,
            "fingerprint": self.fingerprint,
            "preparation": self.preparation,
        }
        header = json.dumps(values, sort_keys=True).encode()
        header += b" " * (-len(header) % 4)
        length = len(header).to_bytes(4, "little")
        write_atomically(path, SUBSET_MAGIC + length + header + self.bits.tobytes())

    @classmethod
    def read(cls, path: Path) -> Subset:
        """Reads a subset.

        Raises:
            InputError: if the file is missing or damaged, or has a different format version.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: expected a subset: {error.strerror}; create one with "
                "python -m data_prep.make_subset"
            ) from None
        if content[:8] != SUBSET_MAGIC:
            raise InputError(f"{path}: expected a subset ({SUBSET_MAGIC!r}), found {content[:8]!r}")
        try:
            header_end = 12 + int.from_bytes(content[8:12], "little")
            header = json.loads(content[12:header_end])
            subset = cls(
                header["dataset_fingerprint"],
                header["num_samples"],
                np.frombuffer(content, np.uint8, offset=header_end),
                header["preparation"],
                path,
            )
            subset._check_against(header)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: damaged subset ({error}); create it again with "
                "python -m data_prep.make_subset"
            ) from None
        return subset

    def _check_against(self, header: dict[str, Any]) -> None:
        expected = {
            "bytes of bits": (self.num_samples + 7) // 8,
            "num_kept": header["num_kept"],
            "fingerprint": header["fingerprint"],
        }
        found = {"bytes of bits": len(self.bits)}
        if found["bytes of bits"] == expected["bytes of bits"]:
            found |= {"num_kept": self.num_kept, "fingerprint": self.fingerprint}
        for name, value in found.items():
            if value != expected[name]:
                raise ValueError(f"expected {name} {expected[name]}, found {value}")

    def check_belongs_to(self, info: DatasetInfo) -> None:
        """Checks that this is a subset of the dataset that `info` describes.

        Raises:
            InputError: if it belongs to a different dataset.
        """
        expected = (info.fingerprint, info.num_samples)
        if (self.dataset_fingerprint, self.num_samples) != expected:
            raise InputError(
                f"{self.path or 'subset'}: belongs to a dataset of {self.num_samples:,} samples "
                f"with fingerprint {self.dataset_fingerprint}, not to this dataset of "
                f"{info.num_samples:,} samples with fingerprint {info.fingerprint}; create a "
                "subset of this dataset with python -m data_prep.make_subset"
            )

    # ---------------------------------------------------------------------------------- numbers

    @property
    def bitmap(self) -> np.ndarray:
        """Kept samples by ordinal, bool [num_samples]."""
        return np.unpackbits(self.bits, count=self.num_samples, bitorder="little").view(bool)

    @cached_property
    def num_kept(self) -> int:
        return int(self._kept_before_block[-1])

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the dataset's fingerprint, its size and the bits."""
        whole = json.dumps([self.dataset_fingerprint, self.num_samples]).encode()
        return hashlib.sha256(whole + b"\n" + self.bits.tobytes()).hexdigest()

    @cached_property
    def _blocks(self) -> np.ndarray:
        """Bits padded with zeros, uint8 [blocks, BLOCK_BYTES]."""
        num_blocks = len(self.bits) // BLOCK_BYTES + 1
        blocks = np.zeros(num_blocks * BLOCK_BYTES, dtype=np.uint8)
        blocks[: len(self.bits)] = self.bits
        return blocks.reshape(num_blocks, BLOCK_BYTES)

    @cached_property
    def _kept_before_block(self) -> np.ndarray:
        """Number of kept samples before each block, and the total: int64 [blocks + 1]."""
        counts = np.bitwise_count(self._blocks).sum(axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def ordinals_of(self, ranks: np.ndarray | Sequence[int]) -> np.ndarray:
        """Returns the ordinals, int64 [n], of kept samples with ranks in [0, num_kept)."""
        return _in_chunks(self._ordinals_of, ranks)

    def _ordinals_of(self, ranks: np.ndarray) -> np.ndarray:
        block = np.searchsorted(self._kept_before_block, ranks, side="right") - 1
        # Number of kept samples in the block that precede the sample.
        left = ranks - self._kept_before_block[block]
        in_block = self._blocks[block]  # [n, BLOCK_BYTES]
        up_to_byte = np.cumsum(np.bitwise_count(in_block), axis=1, dtype=np.int64)
        byte = (up_to_byte <= left[:, None]).sum(axis=1)
        rows = np.arange(len(ranks))
        value = in_block[rows, byte]
        left -= up_to_byte[rows, byte] - np.bitwise_count(value)
        return (block * BLOCK_BYTES + byte) * 8 + _POSITION_IN_BYTE[value, left]

    def ranks_of(self, ordinals: np.ndarray | Sequence[int]) -> np.ndarray:
        """Returns how many kept samples precede each ordinal in [0, num_samples], int64 [n]."""
        return _in_chunks(self._ranks_of, ordinals)

    def _ranks_of(self, ordinals: np.ndarray) -> np.ndarray:
        whole_bytes, bit = np.divmod(ordinals, 8)
        block, byte = np.divmod(whole_bytes, BLOCK_BYTES)
        in_block = self._blocks[block]  # [n, BLOCK_BYTES]
        before = np.where(np.arange(BLOCK_BYTES) < byte[:, None], np.bitwise_count(in_block), 0)
        of_byte = in_block[np.arange(len(ordinals)), byte] & ((1 << bit) - 1).astype(np.uint8)
        ranks = self._kept_before_block[block] + before.sum(axis=1, dtype=np.int64)
        return ranks + np.bitwise_count(of_byte)


class KeptSamples:
    """A dataset, or the samples of it that a subset keeps, read by rank.

    Args:
        dataset: the dataset or its folder.
        subset: the subset or its file. None keeps all samples; ranks are then ordinals.
        required: modalities that every sample of the subset has.

    Raises:
        InputError: if the dataset or subset is missing or damaged, or they do not belong together.
    """

    def __init__(
        self, dataset: Path | Dataset, *, subset: Path | Subset | None, required: Sequence[str] = ()
    ) -> None:
        self.dataset = dataset if isinstance(dataset, Dataset) else Dataset(dataset)
        self.subset = Subset.read(subset) if isinstance(subset, Path) else subset
        self.required = frozenset(required)
        self.shard_sizes = self.dataset.shard_sizes  # int64 [shards]: kept samples per shard
        if self.subset is not None:
            self.subset.check_belongs_to(self.dataset.info)
            self.shard_sizes = np.diff(self.subset.ranks_of(self.dataset.shard_starts))

    def __len__(self) -> int:
        return len(self.dataset) if self.subset is None else self.subset.num_kept

    @property
    def folder(self) -> Path:
        return self.dataset.folder

    @property
    def info(self) -> DatasetInfo:
        """The description of the whole dataset."""
        return self.dataset.info

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the dataset, followed by the fingerprint of the subset if there is one."""
        if self.subset is None:
            return self.info.fingerprint
        return f"{self.info.fingerprint} subset {self.subset.fingerprint}"

    def ordinals_of(self, ranks: np.ndarray | Sequence[int]) -> np.ndarray:
        """Returns the ordinals of ranks, int64 [n]."""
        return np.asarray(ranks) if self.subset is None else self.subset.ordinals_of(ranks)

    def ranks_of(self, ordinals: np.ndarray | Sequence[int]) -> np.ndarray:
        """Returns the ranks of ordinals, int64 [n]."""
        return np.asarray(ordinals) if self.subset is None else self.subset.ranks_of(ordinals)

    def having_all(self, names: Sequence[str]) -> KeptSamples:
        """Returns the samples among these that have all of some modalities.

        Only indexes are read. Where every sample has them, these samples are returned.

        Args:
            names: modalities of the dataset.

        Raises:
            InputError: if the dataset does not have one of them, or no sample has all.
        """
        modalities = self.dataset.modalities
        modalities.check_known(names, where=str(self.folder))
        if all(modalities[name].num_samples in (None, len(self.dataset)) for name in names):
            return self
        shards = range(len(self.dataset.manifest))
        bitmap = np.concatenate([self.dataset.has_all(shard, names) for shard in shards])
        if self.subset is not None:
            bitmap &= self.subset.bitmap
        if not bitmap.any():
            raise InputError(f"{self.folder}: no sample has all of {', '.join(names)}")
        selected = Subset.from_bitmap(self.info, bitmap, preparation={})
        return KeptSamples(self.dataset, subset=selected, required=names)

    def has_any_with(self, names: Sequence[str]) -> bool:
        """Returns whether one of these samples has all of some modalities.

        Indexes are read until one is found; shards with a missing or damaged index are skipped.

        Args:
            names: modalities of the dataset.
        """
        counts = [self.dataset.modalities[name].num_samples for name in names]
        if 0 in counts:
            return False
        if all(count in (None, len(self.dataset)) for count in counts):
            return len(self) > 0
        kept = None if self.subset is None else self.subset.bitmap
        for shard in np.flatnonzero(self.shard_sizes).tolist():
            with suppress(BadShardError):
                has_all = self.dataset.has_all(shard, names)
                if kept is not None:
                    start, stop = self.dataset.shard_starts[shard : shard + 2]
                    has_all = has_all & kept[start:stop]
                if has_all.any():
                    return True
        return False

    def identities(self) -> list[tuple[str, int]]:
        """Returns (fingerprint of the whole dataset, ordinal) of each kept sample."""
        fingerprint = self.info.fingerprint
        return [
            (fingerprint, ordinal) for ordinal in self.ordinals_of(np.arange(len(self))).tolist()
        ]

    def read_sample(self, rank: int, *, fields: Sequence[str] | None = None) -> Sample:
        """Reads a kept sample; see `Dataset.read_sample`."""
        return self.dataset.read_sample(int(self.ordinals_of([rank])[0]), fields=fields)

    def read_modalities(self, rank: int, *, names: Collection[str] | None = None) -> SampleContents:
        """Reads a kept sample by modality; see `Dataset.read_modalities`."""
        return self.dataset.read_modalities(int(self.ordinals_of([rank])[0]), names=names)


def _in_chunks(search: Any, numbers: np.ndarray | Sequence[int]) -> np.ndarray:
    numbers = np.asarray(numbers, dtype=np.int64)
    starts = range(0, len(numbers), QUERIES_AT_ONCE)
    chunks = [search(numbers[start : start + QUERIES_AT_ONCE]) for start in starts]
    return np.concatenate(chunks) if chunks else np.empty(0, dtype=np.int64)
