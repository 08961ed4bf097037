"""Several datasets as one row of samples, and the columns of their Parquet sidecars.

A sample's number is its place when all datasets are laid end to end. What is read of the columns is
kept in arrays, or, where it is large, in files of a temporary folder that numpy maps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import InputError
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.parquet import read_shard_parquet

if TYPE_CHECKING:
    import pyarrow

MEASURE_ADVICE = "make the Parquets with python -m data_prep.index_shards and measure=true"


class JoinedDatasets:
    """Datasets of one kind of media, those to choose from before the evaluation datasets.

    Args:
        datasets: folders of those to choose from.
        against: folders of evaluation datasets.

    Raises:
        InputError: a dataset is missing or damaged, stands there twice, or is of another kind.
    """

    def __init__(self, datasets: Sequence[Path], *, against: Sequence[Path]) -> None:
        self.folders = (*datasets, *against)
        files = [read_dataset_files(folder) for folder in self.folders]
        self.infos = [info for info, _ in files]
        self.manifests = [manifest for _, manifest in files]
        self.num_datasets = len(datasets)  # to choose from
        sizes = [info.num_samples for info in self.infos]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._check()
        self.media = self.infos[0].media

    def _check(self) -> None:
        for number, (folder, info) in enumerate(zip(self.folders, self.infos, strict=True)):
            first = self.infos[0]
            if info.media != first.media:
                raise InputError(
                    f"{folder}: expected {first.media} as in {self.folders[0]}, found {info.media};"
                    " look for duplicates of each kind of media by itself"
                )
            fingerprints = [other.fingerprint for other in self.infos[:number]]
            if info.num_samples and info.fingerprint in fingerprints:
                raise InputError(
                    f"{folder}: is the same dataset as "
                    f"{self.folders[fingerprints.index(info.fingerprint)]}; give it once"
                )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_queries(self) -> int:
        """Samples to choose from; the evaluation samples come after them."""
        return int(self.starts[self.num_datasets])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Number of the dataset, and ordinal in it, of samples int64 [n]."""
        dataset = np.searchsorted(self.starts, samples, side="right") - 1
        return dataset, samples - self.starts[dataset]

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[int, pyarrow.Table]]:
        """(number of its first sample, some columns) of each shard, in order.

        Raises:
            InputError: a Parquet is missing, is damaged, has no such column, or has other rows than
                the shard.
        """
        for folder, manifest, start in zip(
            self.folders, self.manifests, self.starts[:-1].tolist(), strict=True
        ):
            for row in manifest:
                path = folder / f"{row.name}.parquet"
                if not path.exists():
                    raise InputError(
                        f"{path}: expected the columns of a shard, found no such file; make it "
                        "with python -m data_prep.index_shards"
                    )
                table = read_shard_parquet(path, columns=list(columns))
                _check_table(path, table, columns=columns, num_samples=row.num_samples)
                yield start, table
                start += row.num_samples


def _check_table(
    path: Path, table: pyarrow.Table, *, columns: Sequence[str], num_samples: int
) -> None:
    missing = [name for name in columns if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path}: expected columns {', '.join(columns)}, found no {missing[0]}; "
            f"{MEASURE_ADVICE}"
        )
    if table.num_rows != num_samples:
        raise InputError(
            f"{path}: expected {num_samples} rows (manifest.jsonl), found {table.num_rows}; check "
            "the dataset with python -m data_prep.verify_shards"
        )


def number_column(datasets: JoinedDatasets, name: str) -> tuple[np.ndarray, np.ndarray]:
    """(values [samples], bool [samples]: is there one?) of a column of numbers.

    Raises:
        InputError: as JoinedDatasets.tables.
    """
    values, is_there = [], []
    for _, table in datasets.tables([name]):
        column = table[name]
        is_there.append(column.is_valid().to_numpy())
        values.append(column.fill_null(0).to_numpy())
    if not values:
        return np.empty(0), np.empty(0, dtype=bool)
    return np.concatenate(values), np.concatenate(is_there)


def binary_column(
    datasets: JoinedDatasets, name: str, *, samples: np.ndarray, path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The bytes of some samples in a column, laid end to end in a file.

    Args:
        datasets: to read.
        name: of the column.
        samples: bool [samples]: which of them.
        path: of a temporary file; the result reads it.

    Returns:
        uint8 [all bytes]; int64 [chosen samples + 1]: where those of each begin, and a sample that
        has none has no bytes; bool [samples]: is there a value, also of those that are not chosen?

    Raises:
        InputError: as JoinedDatasets.tables.
    """
    import pyarrow

    lengths, is_there = [np.zeros(1, np.int64)], [np.empty(0, dtype=bool)]
    with path.open("wb") as file:
        for start, table in datasets.tables([name]):
            is_there.append(table[name].is_valid().to_numpy())
            chosen = pyarrow.array(samples[start : start + table.num_rows])
            for chunk in table[name].filter(chosen).fill_null(b"").chunks:
                offsets = np.frombuffer(chunk.buffers()[1], np.int32)
                offsets = offsets[chunk.offset : chunk.offset + len(chunk) + 1]
                if len(offsets) > 1 and offsets[-1] > offsets[0]:
                    content = np.frombuffer(chunk.buffers()[2], np.uint8)
                    content[offsets[0] : offsets[-1]].tofile(file)
                lengths.append(np.diff(offsets).astype(np.int64))
    starts = np.cumsum(np.concatenate(lengths))
    content = mapped_file(path, np.uint8, (int(starts[-1]),))
    return content, starts, np.concatenate(is_there)


def mapped_file(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """What a file holds, as an array that stays on disk."""
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", shape=shape)
