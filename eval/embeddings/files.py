"""The files that `python -m eval.embed` writes, one for each shard, and what they are made from.

    00000000.parquet   rows in the shard's order: uid, key, media_embedding [D], caption_embeddings
                       [captions, D]; L2-normalised float32. Its metadata say what it was made from,
                       and which samples are left out because their bytes are bad.
    embeddings.json    written last: a folder without it is unfinished

A row is found by its uid or key: where a sample is left out, its row is missing.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.config_file import differing_keys
from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.storage.atomic import write_atomically

if TYPE_CHECKING:
    from eval.models.encoder import Encoder
    from eval.models.loaded_model import ModelOrigin

BAD_SAMPLES = "isopair.bad_samples"


@dataclass(frozen=True)
class BadSample:
    """A sample that has no row."""

    shard: str
    ordinal: int  # its place in the dataset
    reason: str  # names its key


@dataclass
class ShardEmbeddings:
    """The embeddings of one shard; an item is a sample whose bytes are good."""

    indices: list[int] = field(default_factory=list)  # of the items in the shard
    keys: list[str] = field(default_factory=list)
    num_captions: list[int] = field(default_factory=list)  # of each item
    media: list[np.ndarray] = field(default_factory=list)  # float32 [B, D] of each batch
    captions: list[np.ndarray] = field(default_factory=list)  # float32 [M, D] of each batch
    bad_samples: list[BadSample] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """What embeddings are a function of. Files of another origin are never mixed with these."""

    dataset_fingerprint: str
    checkpoint: str  # sha256 of what the model is rebuilt from
    transform: dict[str, Any]  # of the media
    dtype: str  # of the towers
    embed_dim: int  # D

    def as_metadata(self) -> dict[str, str]:
        values = {"transform": json.dumps(self.transform, sort_keys=True)}
        return {f"isopair.{key}": str(value) for key, value in (asdict(self) | values).items()}


def origin_of(dataset: Dataset, encoder: Encoder) -> Origin:
    """What the embeddings of a dataset by a model are made from."""
    front_end = encoder.front_ends[dataset.info.media]
    return Origin(
        dataset_fingerprint=dataset.info.fingerprint,
        checkpoint=encoder.origin.sha256,
        transform=front_end.settings | {"long_clips": front_end.long_clips},
        dtype=str(encoder.dtype).removeprefix("torch."),
        embed_dim=encoder.embed_dim,
    )


# --------------------------------------------------------------------------------------- shards


def write_shard(
    path: Path, shard: ShardEmbeddings, *, uids: Sequence[str] | None, origin: Origin
) -> None:
    """Writes the embeddings of one shard, whole or not at all.

    Args:
        path: of the Parquet.
        shard: its embeddings.
        uids: of all samples of the shard; None: the keys serve.
        origin: what they were made from.
    """
    offsets = np.concatenate([[0], np.cumsum(shard.num_captions)]).astype(np.int32)
    captions = pyarrow.ListArray.from_arrays(
        pyarrow.array(offsets), _vectors(shard.captions, origin.embed_dim)
    )
    own_uids = shard.keys if uids is None else [uids[place] for place in shard.indices]
    columns = {
        "uid": pyarrow.array(own_uids, pyarrow.string()),
        "key": pyarrow.array(shard.keys, pyarrow.string()),
        "media_embedding": _vectors(shard.media, origin.embed_dim),
        "caption_embeddings": captions,
    }
    bad_samples = json.dumps([asdict(bad) for bad in shard.bad_samples])
    metadata = origin.as_metadata() | {BAD_SAMPLES: bad_samples}
    content = io.BytesIO()
    table = pyarrow.table(columns).replace_schema_metadata(metadata)
    pyarrow.parquet.write_table(table, content)
    write_atomically(path, content.getvalue())


def _vectors(batches: Sequence[np.ndarray], embed_dim: int) -> pyarrow.FixedSizeListArray:
    values = np.concatenate([np.empty((0, embed_dim), np.float32), *batches])  # [n, D]
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.ravel()), embed_dim)


def is_finished(path: Path, origin: Origin) -> bool:
    """Whether a shard's file is there.

    Raises:
        InputError: it is damaged, or was made from something else.
    """
    if not path.exists():
        return False
    found, expected = _read_metadata(path), origin.as_metadata()
    different = differing_keys({key: found.get(key) for key in expected}, expected)
    if different:
        lines = [f"  {key}: {old} there, {new} now" for key, (old, new) in different.items()]
        raise InputError(
            f"{path}: embeddings made from something else:\n" + "\n".join(lines) + "\n"
            "choose another output, or delete this folder"
        )
    return True


def _read_metadata(path: Path) -> dict[str, str]:
    try:
        metadata = pyarrow.parquet.read_schema(path).metadata or {}
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: damaged Parquet ({error}); delete it") from None
    return {key.decode(): value.decode() for key, value in metadata.items()}


def bad_samples_of(path: Path) -> list[BadSample]:
    """The samples that have no row in a shard's file."""
    return [BadSample(**bad) for bad in json.loads(_read_metadata(path)[BAD_SAMPLES])]


def uids_of_shard(dataset: Dataset, shard: int) -> list[str] | None:
    """The uids of all samples of a shard, from its Parquet; None where it has none.

    Raises:
        InputError: the Parquet has other rows than the shard.
    """
    path = dataset.folder / f"{dataset.manifest[shard].name}.parquet"
    if not path.exists():
        return None
    uids = pyarrow.parquet.read_table(path, columns=["uid"])["uid"].to_pylist()
    if len(uids) != dataset.shard_sizes[shard]:
        raise InputError(
            f"{path}: expected {dataset.shard_sizes[shard]} rows (manifest.jsonl), found "
            f"{len(uids)}; check the dataset with python -m data_prep.verify_shards"
        )
    return uids


# -------------------------------------------------------------------------------------- summary


def write_summary(
    folder: Path, *, dataset: Dataset, origin: Origin, model: ModelOrigin
) -> dict[str, Any]:
    """Writes embeddings.json, which says that every shard is there, and returns what it holds."""
    paths = [folder / f"{row.name}.parquet" for row in dataset.manifest]
    bad_samples = [asdict(bad) for path in paths for bad in bad_samples_of(path)]
    record = {
        **asdict(origin),
        "dataset": str(dataset.folder),
        "checkpoint_folder": str(model.folder),
        "media": dataset.info.media,
        "num_samples": len(dataset),
        "num_embedded": len(dataset) - len(bad_samples),
        "num_shards": len(paths),
        "bad_samples": bad_samples,
    }
    content = json.dumps(record, indent=2).encode() + b"\n"
    write_atomically(folder / "embeddings.json", content)
    for leftover in folder.rglob(".*.tmp"):  # of attempts that were killed
        leftover.unlink()
    return record
