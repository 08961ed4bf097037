"""Reads the pairs of an input, whatever its format.

config.input -> format_of -> read_pairs: one Pair per caption, streamed in a fixed order
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
    files_of_input,
    format_of,
    media_root_of,
    readable_input,
    state_of_files,
)
from data_prep.sources.pair import Pair
from data_prep.sources.parquet import read_parquet
from data_prep.sources.tables import read_jsonl, read_table
from data_prep.sources.tars import dataset_folder_of, read_webdataset, subset_of
from data_prep.storage import remote_file

__all__ = ["format_of", "input_state", "media_root_of", "read_pairs"]

READERS: dict[str, Callable[[MakeShards], Iterator[Pair]]] = {
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
# Settings that only some formats can honour.
FORMATS_OF_SETTING = {
    "quotes": ("csv", "tsv"),
    "caption_template": ("class_folders",),
    "subset": ("webdataset",),
    "media_root": ("csv", "tsv", "jsonl", "parquet", "coco", "huggingface"),
}


def read_pairs(config: MakeShards) -> Iterator[Pair]:
    """The pairs of the input, streamed; unusable ones carry their reason.

    Raises:
        InputError: the input is missing, is not readable, has not the configured columns, or is of
            a format that cannot honour a setting.
    """
    file_format = format_of(config)
    _check_settings(config, file_format)
    return READERS[file_format](config)


def _check_settings(config: MakeShards, file_format: str) -> None:
    for name, formats in FORMATS_OF_SETTING.items():
        value = getattr(config, name)
        if value != MakeShards.model_fields[name].default and file_format not in formats:
            raise InputError(
                f"{config.input}: {name}={value} has no meaning for format={file_format}, only "
                f"for {', '.join(formats)}; leave it out"
            )
    without_columns = {"folder": ("media",), "webdataset": ("media",)}
    without_columns["class_folders"] = tuple(Columns.model_fields)
    for name in without_columns.get(file_format, ()):
        value = getattr(config.columns, name)
        if value != Columns.model_fields[name].default:
            raise InputError(
                f"{config.input}: columns.{name}={value} has no meaning for "
                f"format={file_format}; leave it out"
            )


def input_state(config: MakeShards) -> dict[str, Any]:
    """What identifies the input: its format, names and sizes of its files, and of manifests sha256.

    Raises:
        InputError: as read_pairs.
    """
    file_format = format_of(config)
    state: dict[str, Any] = {"format": file_format}
    if file_format == "webdataset" and (folder := dataset_folder_of(config)) is not None:
        dataset = Dataset(folder)
        state["dataset_fingerprint"] = dataset.info.fingerprint
        subset = subset_of(config, dataset)
        return state | ({"subset_fingerprint": subset.fingerprint} if subset else {})
    if file_format in ("folder", "class_folders"):
        with readable_input(config.input):
            return state | state_of_files(remote_file.list_files(config.input, with_sizes=True))
    if file_format == "huggingface":
        return state | state_of_files(_with_sizes(arrow_files(config)))
    files = files_of_input(config, file_format)
    state |= state_of_files(_with_sizes(files))
    return state | (_content_of(files) if file_format in MANIFESTS else {})


def _content_of(files: InputFiles) -> dict[str, str]:
    """sha256 over local manifests: a caption may change while the size stays."""
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
