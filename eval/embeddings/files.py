"""Output files of `python -m eval.embed`: one Parquet file per shard, and a summary.

    00000000.parquet   rows in the shard's order: uid, key, media_embedding [D], caption_embeddings
                       [captions, D]; L2-normalised float32. The metadata record the origin of the
                       embeddings and the skipped corrupt samples.
    embeddings.json    written last; a folder without it is incomplete

With `views`, each view has a folder of such files, named after it. An image, audio clip or vector
has the column media_embedding, a text caption_embeddings.

Look up rows by uid or key, not by position: corrupt samples, and those that lack a view, have no
row.
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
from data_prep.shards.embeddings import CAPTION_EMBEDDINGS, MEDIA_EMBEDDING
from data_prep.storage.atomic import write_atomically
from eval.models.loaded_model import encoding_packages
from pretrain.settings.views import View

if TYPE_CHECKING:
    from eval.models.encoder import Encoder
    from eval.models.loaded_model import ModelOrigin

BAD_SAMPLES = "isopair.bad_samples"


@dataclass(frozen=True)
class BadSample:
    """A corrupt sample, which has no row."""

    shard: str
    ordinal: int  # index in the dataset
    reason: str  # includes the sample's key


@dataclass
class ShardEmbeddings:
    """Embeddings of one shard; its items are the samples that are not corrupt."""

    indices: list[int] = field(default_factory=list)  # index of each item within the shard
    keys: list[str] = field(default_factory=list)
    num_captions: list[int] = field(default_factory=list)  # number of captions of each item
    media: list[np.ndarray] = field(default_factory=list)  # float32 [B, D], one array per batch
    captions: list[np.ndarray] = field(default_factory=list)  # float32 [M, D], one array per batch
    bad_samples: list[BadSample] = field(default_factory=list)


@dataclass(frozen=True)
class FileViews:
    """Views of a sample whose embeddings are in one file."""

    media: str | None  # image, audio clip or vector
    text: str | None
    view: str | None = None  # the only one of both, if the config names views

    @classmethod
    def pair(cls, media: str) -> FileViews:
        """Returns the views of a pair dataset: its media and captions."""
        return cls(media, "text")

    @classmethod
    def single(cls, view: str, *, kind: str) -> FileViews:
        """Returns a single view, of a modality of this kind."""
        return cls(None, view, view) if kind == "text" else cls(view, None, view)

    @property
    def columns(self) -> list[str]:
        """Columns of embeddings in the file."""
        found = {MEDIA_EMBEDDING: self.media, CAPTION_EMBEDDINGS: self.text}
        return [column for column, view in found.items() if view is not None]

    @property
    def members(self) -> list[str]:
        """Modalities of the dataset that are read."""
        return [View.parse(view).member for view in (self.media, self.text) if view is not None]


@dataclass(frozen=True)
class Origin:
    """Everything that the embeddings depend on. Files of different origins are never mixed."""

    dataset_fingerprint: str
    checkpoint: str  # SHA-256 of the model's files
    model_settings: dict[str, Any]  # see ModelOrigin.settings
    packages: dict[str, str | None]  # package -> version, if it determines an embedding
    transform: dict[str, Any]  # settings of the media transform
    dtype: str  # precision of the towers
    embed_dim: int  # D
    view: str | None = None  # None: media and captions of a pair dataset

    def as_metadata(self) -> dict[str, str]:
        """Returns the metadata of a Parquet file with this origin."""
        return {
            f"isopair.{key}": json.dumps(value, sort_keys=True)
            if isinstance(value, dict)
            else str(value)
            for key, value in asdict(self).items()
            if value is not None
        }


def origin_of(dataset: Dataset, encoder: Encoder, views: FileViews | None = None) -> Origin:
    """Returns the origin of a dataset's embeddings under a model.

    Args:
        dataset: dataset to embed.
        encoder: encoder of the model.
        views: views in one file; None: media and captions of a pair dataset.
    """
    views = views or FileViews.pair(dataset.info.media)
    transform: dict[str, Any] = {}
    if views.media is not None:
        front_end = encoder.front_ends[View.parse(views.media).modality]
        transform = front_end.settings | {"long_clips": front_end.long_clips}
    return Origin(
        dataset_fingerprint=dataset.info.fingerprint,
        checkpoint=encoder.origin.sha256,
        model_settings=dict(encoder.origin.settings),
        packages=encoding_packages(),
        transform=transform,
        dtype=str(encoder.dtype).removeprefix("torch."),
        embed_dim=encoder.embed_dim,
        view=views.view,
    )


# --------------------------------------------------------------------------------------- shards


def write_shard(
    path: Path,
    shard: ShardEmbeddings,
    *,
    uids: Sequence[str] | None,
    origin: Origin,
    views: FileViews,
) -> None:
    """Writes the embeddings of one shard atomically.

    Args:
        path: Parquet file to write.
        shard: embeddings of the shard.
        uids: uids of all samples of the shard; None: the keys are used as uids.
        origin: origin of the embeddings.
        views: views in the file.
    """
    own_uids = shard.keys if uids is None else [uids[index] for index in shard.indices]
    columns = {
        "uid": pyarrow.array(own_uids, pyarrow.string()),
        "key": pyarrow.array(shard.keys, pyarrow.string()),
    }
    if views.media is not None:
        columns[MEDIA_EMBEDDING] = _vectors(shard.media, origin.embed_dim)
    if views.text is not None:
        offsets = np.concatenate([[0], np.cumsum(shard.num_captions)]).astype(np.int32)
        columns[CAPTION_EMBEDDINGS] = pyarrow.ListArray.from_arrays(
            pyarrow.array(offsets), _vectors(shard.captions, origin.embed_dim)
        )
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
    """Returns whether a shard's file exists.

    Raises:
        InputError: if the file is damaged or has a different origin.
    """
    if not path.exists():
        return False
    found, expected = _read_metadata(path), origin.as_metadata()
    different = differing_keys({key: found.get(key) for key in expected}, expected)
    if different:
        lines = [f"  {key}: {old} in the file, {new} now" for key, (old, new) in different.items()]
        raise InputError(
            f"{path}: the embeddings have a different origin:\n" + "\n".join(lines) + "\n"
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
    """Reads the corrupt samples recorded in a shard's file."""
    return [BadSample(**bad) for bad in json.loads(_read_metadata(path)[BAD_SAMPLES])]


def uids_of_shard(dataset: Dataset, shard: int) -> list[str] | None:
    """Reads the uids of all samples of a shard from its Parquet file.

    Returns:
        The uids, or None if the shard has no Parquet file.

    Raises:
        InputError: if the number of rows differs from the shard's number of samples.
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
    folder: Path, *, dataset: Dataset, origin: Origin, model: ModelOrigin, views: FileViews
) -> dict[str, Any]:
    """Writes embeddings.json, which marks the folder as complete, and returns its content."""
    shards = range(len(dataset.manifest))
    num_having = sum(int(dataset.has_all(shard, views.members).sum()) for shard in shards)
    num_lacking = len(dataset) - num_having
    paths = [folder / f"{row.name}.parquet" for row in dataset.manifest]
    bad_samples = [asdict(bad) for path in paths for bad in bad_samples_of(path)]
    record = {
        **{key: value for key, value in asdict(origin).items() if value is not None},
        "dataset": str(dataset.folder),
        "checkpoint_folder": str(model.folder),
        **({"media": dataset.info.media} if views.view is None else {}),
        "num_samples": len(dataset),
        **({} if views.view is None else {"columns": views.columns, "num_lacking": num_lacking}),
        "num_embedded": num_having - len(bad_samples),
        "num_shards": len(paths),
        "bad_samples": bad_samples,
    }
    content = json.dumps(record, indent=2).encode() + b"\n"
    write_atomically(folder / "embeddings.json", content)
    for leftover in folder.rglob(".*.tmp"):  # left by attempts that were killed
        leftover.unlink()
    return record
