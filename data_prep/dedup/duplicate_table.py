"""duplicates.parquet: every sample that belongs to a group, and the sample that it matches.

Each row is a sample in a group of one method. Group numbers are unique across methods. The columns
`match_*` identify the similar sample that causes a drop; they are null for kept samples. The file
metadata contains the compared datasets with their fingerprints.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from data_prep.dedup.groups import GroupedSamples
from data_prep.dedup.joined_datasets import JoinedDatasets
from data_prep.errors import InputError
from data_prep.shards.manifest import DatasetInfo
from data_prep.storage.atomic import write_atomically

DATASETS_KEY = b"isopair.datasets"
SCHEMA = pyarrow.schema(
    [
        ("dataset", pyarrow.string()),  # folder, as in the config
        ("ordinal", pyarrow.int64()),  # index in the dataset
        ("key", pyarrow.string()),
        ("uid", pyarrow.string()),
        ("group", pyarrow.int64()),
        ("method", pyarrow.string()),
        ("kept", pyarrow.bool_()),
        ("match_dataset", pyarrow.string()),
        ("match_ordinal", pyarrow.int64()),
        ("match_key", pyarrow.string()),
        ("similarity", pyarrow.float64()),
    ]
)


def write_table(path: Path, datasets: JoinedDatasets, found: Mapping[str, GroupedSamples]) -> None:
    """Writes the groups of every method atomically.

    Args:
        path: path of the Parquet file.
        datasets: compared datasets.
        found: method -> groups.
    """
    named = np.unique(np.concatenate([[], *(groups.sample for groups in found.values())])).astype(
        np.int64
    )
    names = _names_of(datasets, named)
    tables = []
    num_groups = 0
    for method, groups in found.items():
        tables.append(_rows(method, groups, datasets, named, names, first_group=num_groups))
        num_groups += int(groups.group[-1]) + 1 if len(groups.group) else 0
    fingerprints = {
        str(folder): info.fingerprint
        for folder, info in zip(datasets.folders, datasets.infos, strict=True)
    }
    table = pyarrow.concat_tables([SCHEMA.empty_table(), *tables])
    table = table.replace_schema_metadata({DATASETS_KEY: json.dumps(fingerprints)})
    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    write_atomically(path, sink.getvalue())


def name_in_table(path: Path, *, dataset: Path, info: DatasetInfo) -> str:
    """Returns the name of a dataset in a table: its folder, as given to find_duplicates.

    Raises:
        InputError: if the file is not a table of find_duplicates, or does not cover this version
            of the dataset.
    """
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except FileNotFoundError:
        raise InputError(
            f"{path}: expected a table of python -m data_prep.find_duplicates, found no such file"
        ) from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a valid Parquet file: {error}") from None
    if DATASETS_KEY not in metadata:
        raise InputError(
            f"{path}: expected a duplicates.parquet of find_duplicates, found a different file"
        )
    fingerprints = json.loads(metadata[DATASETS_KEY])
    for name, fingerprint in fingerprints.items():
        if fingerprint == info.fingerprint:
            return name
    raise InputError(
        f"{path}: was created from {', '.join(fingerprints)}, and not from the current {dataset} "
        f"(fingerprint {info.fingerprint[:12]}); run find_duplicates on this dataset"
    )


def _names_of(datasets: JoinedDatasets, samples: np.ndarray) -> pyarrow.Table:
    """Reads the columns key and uid of samples, which are in ascending order."""
    schema = pyarrow.schema([SCHEMA.field("key"), SCHEMA.field("uid")])
    tables = [schema.empty_table()]
    for start, table in datasets.tables(["key", "uid"]):
        first, last = np.searchsorted(samples, [start, start + table.num_rows])
        if last > first:
            tables.append(table.take(samples[first:last] - start).cast(schema))
    return pyarrow.concat_tables(tables).combine_chunks()


def _rows(
    method: str,
    groups: GroupedSamples,
    datasets: JoinedDatasets,
    named: np.ndarray,
    names: pyarrow.Table,
    *,
    first_group: int,
) -> pyarrow.Table:
    folders = pyarrow.array([str(folder) for folder in datasets.folders], pyarrow.string())
    number, ordinal = datasets.locate(groups.sample)
    own = names.take(np.searchsorted(named, groups.sample))
    match = np.where(groups.is_kept, 0, groups.match)
    match_number, match_ordinal = datasets.locate(match)
    match_index = np.where(groups.is_kept, 0, np.searchsorted(named, match))
    hidden = groups.is_kept

    def of_match(column: pyarrow.Array | pyarrow.ChunkedArray) -> pyarrow.Array:
        return pyarrow.compute.if_else(pyarrow.array(hidden), None, column)

    columns = {
        "dataset": folders.take(pyarrow.array(number)),
        "ordinal": pyarrow.array(ordinal),
        "key": own["key"],
        "uid": own["uid"],
        "group": pyarrow.array(groups.group + first_group),
        "method": pyarrow.array([method], pyarrow.string()).take(
            pyarrow.array(np.zeros(len(number), np.int64))
        ),
        "kept": pyarrow.array(groups.is_kept),
        "match_dataset": of_match(folders.take(pyarrow.array(match_number))),
        "match_ordinal": of_match(pyarrow.array(match_ordinal)),
        "match_key": of_match(names["key"].take(match_index)),
        "similarity": of_match(pyarrow.array(groups.similarity.astype(np.float64))),
    }
    return pyarrow.table(columns, schema=SCHEMA)
