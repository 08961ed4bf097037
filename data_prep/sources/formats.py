"""Readers of pairs by input format.

PairSource -> format_of -> read_pairs: one Pair per caption, streamed in a fixed order
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from data_prep.config import Columns, MakeShards
from data_prep.errors import InputError
from data_prep.shards.dataset import Dataset
from data_prep.sources.arrow import arrow_files, read_huggingface
from data_prep.sources.coco import read_coco
from data_prep.sources.folders import read_class_folders, read_folder
from data_prep.sources.input_files import (
    InputFiles,
    PairSource,
    files_of_input,
    format_of,
    media_root_of,
    readable_input,
    state_of_files,
)
from data_prep.sources.pair import Pair
from data_prep.sources.parquet import read_parquet
from data_prep.sources.tables import read_jsonl, read_table
from data_prep.sources.tars import dataset_folder_of, read_subset, read_webdataset
from data_prep.storage import remote_file

__all__ = ["format_of", "input_state", "media_root_of", "read_pairs"]

READERS: dict[str, Callable[[PairSource], Iterator[Pair]]] = {
    "csv": partial(read_table, file_format="csv"),
    "tsv": partial(read_table, file_format="tsv"),
    "jsonl": read_jsonl,
    "parquet": read_parquet,
    "folder": read_folder,
    "class_folders": read_class_folders,
    "coco": read_coco,
    "huggingface": read_huggingface,
    "webdataset": read_webdataset,
}
MANIFESTS = ("csv", "tsv", "jsonl", "coco")
FORMATS_OF_PAIRS = ("class_folders", "coco")
# Settings that only some formats use.
FORMATS_OF_SETTING = {
    "quotes": ("csv", "tsv"),
    "separator": ("csv", "tsv"),
    "caption_source": ("folder", "webdataset"),
    "caption_template": ("class_folders",),
    "underscores": ("class_folders",),
    "subset": ("webdataset",),
    "media_root": ("csv", "tsv", "jsonl", "parquet", "coco", "huggingface"),
}


def read_pairs(source: PairSource) -> Iterator[Pair]:
    """Streams the pairs of an input; each unusable pair carries its reason.

    Raises:
        InputError: if the input is missing or unreadable, lacks a configured column, or has a
            format for which a setting is not supported.
    """
    file_format = format_of(source)
    _check_settings(source, file_format)
    if source.media is None and file_format in FORMATS_OF_PAIRS:
        raise InputError(
            f"{source.input}: format={file_format} holds pairs: set media to image or audio, and "
            f"remove {', '.join(source.columns.by_modality())} from columns"
        )
    return READERS[file_format](source)


def _check_settings(source: PairSource, file_format: str) -> None:
    for name, formats in FORMATS_OF_SETTING.items():
        value = getattr(source, name)
        if value != MakeShards.model_fields[name].default and file_format not in formats:
            raise InputError(
                f"{source.input}: {name}={value} is not supported for format={file_format}, only "
                f"for {', '.join(formats)}; remove it"
            )
    without_columns = {"folder": ("media",), "webdataset": ("media",)}
    without_columns["class_folders"] = tuple(Columns.model_fields)
    for name in without_columns.get(file_format, ()):
        value = getattr(source.columns, name)
        if value != Columns.model_fields[name].default:
            raise InputError(
                f"{source.input}: columns.{name}={value} is not supported for "
                f"format={file_format}; remove it"
            )


def input_state(source: PairSource) -> dict[str, Any]:
    """Describes the state of an input, so that changes are detected.

    Returns:
        The format, and the fingerprint of a dataset and subset. For other inputs, a digest of the
        names and sizes of all files; for local manifests, also a sha256 of their content.

    Raises:
        InputError: in the same cases as `read_pairs`.
    """
    file_format = format_of(source)
    state: dict[str, Any] = {"format": file_format}
    if file_format == "webdataset" and (folder := dataset_folder_of(source)) is not None:
        dataset = Dataset(folder)
        state["dataset_fingerprint"] = dataset.info.fingerprint
        subset = read_subset(source.subset, dataset)
        return state | ({"subset_fingerprint": subset.fingerprint} if subset else {})
    if file_format in ("folder", "class_folders"):
        with readable_input(source.input):
            return state | state_of_files(remote_file.list_files(source.input, with_sizes=True))
    if file_format == "huggingface":
        return state | state_of_files(_with_sizes(arrow_files(source.input)))
    files = files_of_input(source.input, file_format)
    state |= state_of_files(_with_sizes(files))
    return state | (_content_of(files) if file_format in MANIFESTS else {})


def _content_of(files: InputFiles) -> dict[str, str]:
    # A caption may change while the file's size does not.
    digest = hashlib.sha256()
    for path in map(files.path_of, files.names):
        if (local := remote_file.local_path(path)) is not None:
            with readable_input(path), local.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return {"sha256": digest.hexdigest()}


def _with_sizes(files: InputFiles) -> Iterator[remote_file.FoundFile]:
    for name in files.names:
        path = files.path_of(name)
        with readable_input(path):
            yield remote_file.FoundFile(name, remote_file.size_of(path))
