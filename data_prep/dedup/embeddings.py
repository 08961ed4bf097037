"""Media embeddings of several datasets, read from output folders of `python -m eval.embed`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.dedup.joined_datasets import JoinedDatasets, mapped_file
from data_prep.errors import InputError
from data_prep.shards.embeddings import check_embeddings
from data_prep.shards.parquet import read_shard_parquet

if TYPE_CHECKING:
    import pyarrow

# Must be equal in all folders
ORIGIN = ("checkpoint", "model_settings", "transform", "embed_dim")
MAX_NORM_ERROR = 1e-3  # maximum deviation of an embedding's norm from 1


def read_embeddings(
    datasets: JoinedDatasets, folders: Sequence[Path], *, is_remaining: np.ndarray, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Reads the media embeddings of the remaining samples; samples without one are skipped.

    Args:
        datasets: datasets of the samples.
        folders: one folder of embeddings per dataset, in the same order.
        is_remaining: bool [samples], whether a sample remains.
        path: path of a temporary file, which backs the result.

    Returns:
        (float32 [n, D], L2-normalised; int64 [n], samples in ascending order)

    Raises:
        InputError: if a folder is unfinished or damaged, or does not belong to its dataset. Also if
            the embeddings are not comparable because they are from different checkpoints.
    """
    if len(folders) != len(datasets.folders):
        raise InputError(
            f"semantic: expected a folder of embeddings for each of {len(datasets.folders)} "
            f"datasets (embeddings, against_embeddings), found {len(folders)}"
        )
    for folder, info in zip(folders, datasets.infos, strict=True):
        check_embeddings(folder, info.fingerprint)
    dim = _check_origins(folders)
    samples = [np.empty(0, np.int64)]
    rows = [
        folder / f"{row.name}.parquet"
        for folder, manifest in zip(folders, datasets.manifests, strict=True)
        for row in manifest
    ]
    with path.open("wb") as file:
        for row, (start, table) in zip(rows, datasets.tables(["key"]), strict=True):
            embeddings, positions = _read_shard(row, table["key"], dim)
            is_chosen = is_remaining[start + positions]
            embeddings[is_chosen].tofile(file)
            samples.append(start + positions[is_chosen])
    sample = np.concatenate(samples)
    return mapped_file(path, np.float32, (len(sample), dim)), sample


def _check_origins(folders: Sequence[Path]) -> int:
    """Checks that all embeddings are from one checkpoint, and returns their width."""
    first: dict[str, Any] = json.loads((folders[0] / "embeddings.json").read_text("utf-8"))
    for folder in folders[1:]:
        record = json.loads((folder / "embeddings.json").read_text("utf-8"))
        for name in ORIGIN:
            # Older embeddings have no model_settings, which are empty for Isopair's checkpoints.
            expected, found = first.get(name, {}), record.get(name, {})
            if found != expected:
                raise InputError(
                    f"{folder}: expected the {name} of {folders[0]}, {expected}, found {found}; "
                    "embed all datasets with one checkpoint"
                )
    return first["embed_dim"]


def _read_shard(path: Path, keys: pyarrow.ChunkedArray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns (embeddings, float32 [n, D]; their positions in the shard, int64 [n]).

    Args:
        path: Parquet file of the shard's embeddings.
        keys: keys of all samples of the shard.
        dim: width of the embeddings.
    """
    import pyarrow.compute

    table = read_shard_parquet(path, columns=["key", "media_embedding"])
    positions = pyarrow.compute.index_in(table["key"], value_set=keys.combine_chunks())
    if positions.null_count or not _is_ascending(positions.to_numpy()):
        raise InputError(
            f"{path}: expected one row per sample of the shard, in order, found other keys; "
            "recreate the embeddings with python -m eval.embed"
        )
    flat = table["media_embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    embeddings = flat.astype(np.float32, copy=False).reshape(table.num_rows, dim)
    lengths = np.linalg.norm(embeddings, axis=1)
    if len(lengths) and not np.abs(lengths - 1).max() < MAX_NORM_ERROR:
        raise InputError(
            f"{path}: expected L2-normalised embeddings, found norms from {lengths.min():g} to "
            f"{lengths.max():g}; recreate them with python -m eval.embed"
        )
    return embeddings, positions.to_numpy().astype(np.int64)


def _is_ascending(positions: np.ndarray) -> bool:
    return bool((np.diff(positions) > 0).all())
