"""Several datasets as one sequence of samples, and the columns of their Parquet files.

A sample's number is its index in the concatenation of all datasets. Columns are read into arrays;
large columns are read into temporary files that numpy maps into memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import InputError
from data_prep.modalities.modality import Modalities
from data_prep.shards.manifest import read_dataset_files
from data_prep.shards.parquet import check_parquet_sum, read_shard_parquet

if TYPE_CHECKING:
    import pyarrow

MEASURE_ADVICE = "create the Parquet files with python -m data_prep.index_shards and measure=true"


class JoinedDatasets:
    """Datasets of one kind of media; query datasets come before evaluation datasets.

    Samples of modalities are compared by one image, clip or vector, and by one text. The columns of
    these modalities have the names that they have in a pair dataset: `sha256`, `captions`.

    Args:
        datasets: folders of the query datasets, whose duplicates are dropped.
        against: folders of the evaluation datasets.
        modality: name of the image, clip or vector; None: the only one of each dataset.
        text: name of the text; None: the only one of each dataset.

    Raises:
        InputError: if a dataset is missing, damaged or listed twice, or the kinds of media differ.
            Also if a dataset has no such modality, or several.
    """

    def __init__(
        self,
        datasets: Sequence[Path],
        *,
        against: Sequence[Path],
        modality: str | None = None,
        text: str | None = None,
    ) -> None:
        self.folders = (*datasets, *against)
        files = [read_dataset_files(folder) for folder in self.folders]
        self.infos = [info for info, _ in files]
        self.manifests = [manifest for _, manifest in files]
        self.num_datasets = len(datasets)  # query datasets
        sizes = [info.num_samples for info in self.infos]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._checked: set[Path] = set()  # Parquet files whose checksum was verified
        self._text = text
        self.modalities = [info.named_modalities() for info in self.infos]
        self.compared = [
            _compared(folder, modalities, modality)
            for folder, modalities in zip(self.folders, self.modalities, strict=True)
        ]
        self._check()

    @property
    def media(self) -> str:
        """The kind of the compared modality: image, audio or vector."""
        return self._kind(0)

    def _kind(self, number: int) -> str:
        return self.modalities[number][self.compared[number]].kind

    def _check(self) -> None:
        for number, (folder, info) in enumerate(zip(self.folders, self.infos, strict=True)):
            if self._kind(number) != self.media:
                raise InputError(
                    f"{folder}: expected {self.media} as in {self.folders[0]}, found "
                    f"{self._kind(number)}; run find_duplicates separately for each kind of media"
                )
            fingerprints = [other.fingerprint for other in self.infos[:number]]
            if info.num_samples and info.fingerprint in fingerprints:
                raise InputError(
                    f"{folder}: duplicate of the dataset "
                    f"{self.folders[fingerprints.index(info.fingerprint)]}; remove one of them"
                )

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_queries(self) -> int:
        """The number of query samples; the evaluation samples come after them."""
        return int(self.starts[self.num_datasets])

    def locate(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the dataset index and the ordinal in that dataset of samples int64 [n]."""
        dataset = np.searchsorted(self.starts, samples, side="right") - 1
        return dataset, samples - self.starts[dataset]

    def tables(self, columns: Sequence[str]) -> Iterator[tuple[int, pyarrow.Table]]:
        """Yields (number of the first sample, table of the columns) of each shard, in order.

        Raises:
            InputError: if a Parquet file is missing or damaged, lacks a column, or has the wrong
                number of rows.
        """
        for number, (folder, manifest, start) in enumerate(
            zip(self.folders, self.manifests, self.starts[:-1].tolist(), strict=True)
        ):
            stored = self._stored_columns(number, columns)
            for row in manifest:
                path = folder / f"{row.name}.parquet"
                if not path.exists():
                    raise InputError(
                        f"{path}: expected the columns of a shard, found no such file; create it "
                        "with python -m data_prep.index_shards"
                    )
                if path not in self._checked:  # once per run: columns are read one after another
                    check_parquet_sum(path, row)
                    self._checked.add(path)
                table = read_shard_parquet(path, columns=stored)
                _check_table(path, table, columns=stored, num_samples=row.num_samples)
                yield start, table.select(stored).rename_columns(list(columns))
                start += row.num_samples

    def _stored_columns(self, number: int, columns: Sequence[str]) -> list[str]:
        """Returns the names that columns of a pair dataset have in one of the datasets."""
        modalities, folder = self.modalities[number], self.folders[number]
        if modalities.is_pair:
            return list(columns)
        prefix = f"{self.compared[number]}_"
        stored = []
        for column in columns:
            if column == "captions":
                stored.append(_only(folder, modalities, ("text",), self._text, key="text"))
            else:
                stored.append(column if column in ("key", "uid") else prefix + column)
        return stored


def _compared(folder: Path, modalities: Modalities, name: str | None) -> str:
    if modalities.is_pair:  # for example an evaluation set
        return modalities.media[0]
    return _only(folder, modalities, ("image", "audio", "vector"), name, key="modality")


def _only(
    folder: Path, modalities: Modalities, kinds: Sequence[str], name: str | None, *, key: str
) -> str:
    """Returns the given modality, or the only one of some kinds."""
    found = modalities.names_of(*kinds)
    if name in found:
        return str(name)
    if name is None and len(found) == 1:
        return found[0]
    raise InputError(
        f"{folder}: {key}={name}: expected one of {', '.join(found) or 'none'}; set {key} to the "
        f"modality of kind {' or '.join(kinds)} to compare"
    )


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
    """Reads a numeric column.

    Returns:
        (values [samples], bool [samples]: whether the value is not null)

    Raises:
        InputError: in the same cases as `JoinedDatasets.tables`.
    """
    values, has_value = [], []
    for _, table in datasets.tables([name]):
        column = table[name]
        has_value.append(column.is_valid().to_numpy())
        values.append(column.fill_null(0).to_numpy())
    if not values:
        return np.empty(0), np.empty(0, dtype=bool)
    return np.concatenate(values), np.concatenate(has_value)


def binary_column(
    datasets: JoinedDatasets, name: str, *, samples: np.ndarray, path: Path
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Reads a binary column of selected samples into a file.

    Args:
        datasets: datasets to read.
        name: name of the column.
        samples: bool [samples], samples to read.
        path: path of a temporary file, which backs the result.

    Returns:
        content: uint8, the concatenated values.
        starts: int64 [selected samples + 1], offsets of the values; nulls are empty.
        has_value: bool [samples], whether the value is not null; includes unselected samples.

    Raises:
        InputError: in the same cases as `JoinedDatasets.tables`.
    """
    import pyarrow

    lengths, has_value = [np.zeros(1, np.int64)], [np.empty(0, dtype=bool)]
    with path.open("wb") as file:
        for start, table in datasets.tables([name]):
            has_value.append(table[name].is_valid().to_numpy())
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
    return content, starts, np.concatenate(has_value)


def mapped_file(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """Creates an array that is memory-mapped to a file."""
    if 0 in shape:  # an empty file cannot be mapped
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, mode="r", shape=shape)
