"""Resolution of an input to its format and its files.

1. `format_of`       file, folder, glob or URL -> format
2. `files_of_input`  format -> a folder and the sorted names of files in it
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from data_prep.config import CaptionSource, Columns, MakeShards, MediaKind
from data_prep.errors import InputError
from data_prep.storage import remote_file

FORMAT_OF_SUFFIX = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".json": "coco",
    ".tar": "webdataset",
}
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".lz4")
TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")  # may be compressed
MAX_ENTRIES_SCANNED = 10_000  # when the format of a folder is detected
# Extensions of files and members that may be media; the format is detected by content.
MEDIA_SUFFIXES = {
    "image": (
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"),
        *(".tif", ".tiff", ".avif", ".heic", ".heif", ".jp2"),
    ),
    "audio": (
        *(".flac", ".wav", ".mp3", ".ogg", ".oga", ".opus", ".aif", ".aiff", ".aifc"),
        *(".au", ".m4a"),
    ),
}


@dataclass(frozen=True)
class PairSource:
    """An input and the settings for reading its pairs, named as in `MakeShards`."""

    input: str
    format: str
    media: MediaKind | None  # None: the rows are samples of modalities
    media_root: str | None
    columns: Columns
    keep_columns: tuple[str, ...]
    caption_source: CaptionSource
    caption_template: str
    underscores: Literal["keep", "spaces"]
    subset: Path | None
    quotes: bool | None
    separator: str | None
    min_modalities: int
    bad_modality: Literal["reject", "absent"]

    @classmethod
    def from_config(cls, config: MakeShards) -> PairSource:
        """Copies the fields from a config."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(cls)})


@dataclass(frozen=True)
class InputFiles:
    """The files of an input, in reading order."""

    folder: str  # path or URL
    names: list[str]  # relative to the folder

    def path_of(self, name: str) -> str:
        """Returns the path or URL of one of the files."""
        return remote_file.join(self.folder, name)


@contextlib.contextmanager
def readable_input(path: str) -> Iterator[None]:
    """Converts an OSError about a file given by the user into an InputError.

    Raises:
        InputError: if the block raises an OSError; the message includes the file.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def format_suffix(path: str) -> str:
    """Returns the extension that tells the format: `.csv` for `pairs.csv.gz`."""
    suffix = remote_file.suffix_of(path)
    if suffix in COMPRESSED_SUFFIXES:
        name = path.partition("?")[0] if remote_file.is_web_url(path) else path
        inner = remote_file.suffix_of(name[: -len(suffix)])
        return inner if inner in TEXT_SUFFIXES else suffix
    return suffix


def format_of(source: PairSource) -> str:
    """Returns the input's format: the configured one, or the one detected by name and content.

    Raises:
        InputError: if the input does not exist, or its format cannot be detected.
    """
    if source.format != "auto":
        return source.format
    path = source.input
    with readable_input(path):
        if remote_file.is_pattern(path):
            folder, names = remote_file.glob_files(path)
            return _format_of_names([remote_file.join(folder, name) for name in names], path)
        if remote_file.is_folder(path):
            return _format_of_folder(path, source)
        if not remote_file.is_web_url(path) and not remote_file.exists(path):
            raise _no_input(path)
    return _format_of_names([path], path)


def _no_input(path: str) -> InputError:
    return InputError(f"{path}: expected a manifest or a folder of pairs (input), found nothing")


def _format_of_names(paths: list[str], given: str) -> str:
    suffixes = sorted({format_suffix(path) for path in paths})
    if not suffixes:
        raise _no_input(given)
    if len(suffixes) > 1 or suffixes[0] not in FORMAT_OF_SUFFIX:
        raise InputError(
            f"{given}: expected one of {' '.join(FORMAT_OF_SUFFIX)} or a folder (input), found "
            f"{' '.join(suffix or 'no extension' for suffix in suffixes)}; set the format with "
            "format="
        )
    return FORMAT_OF_SUFFIX[suffixes[0]]


def _format_of_folder(folder: str, source: PairSource) -> str:
    # Tars are checked first, because img2dataset writes Parquet files and statistics next to them.
    if remote_file.exists(remote_file.join(folder, "dataset.json")):
        return "webdataset"
    for name in ("dataset_dict.json", "state.json"):
        if remote_file.exists(remote_file.join(folder, name)):
            return "huggingface"
    entries = islice(remote_file.list_files(folder), MAX_ENTRIES_SCANNED)
    suffixes = {remote_file.suffix_of(entry.name) for entry in entries}
    for suffix in (".tar", ".parquet"):
        if suffix in suffixes:
            return FORMAT_OF_SUFFIX[suffix]
    has_classes = source.caption_template != "{}" or source.underscores != "keep"
    return "class_folders" if has_classes else "folder"


def files_of_input(path: str, file_format: str) -> InputFiles:
    """Lists the files of an input that is a file, a glob, or a folder to search.

    Args:
        path: input path, glob or URL.
        file_format: format that selects the files in a folder, by extension.

    Raises:
        InputError: if there is no such file.
    """
    suffixes = [s for s, of_suffix in FORMAT_OF_SUFFIX.items() if of_suffix == file_format]
    with readable_input(path):
        if remote_file.is_pattern(path):
            files = InputFiles(*remote_file.glob_files(path))
        elif remote_file.is_folder(path):
            found = (file.name for file in remote_file.list_files(path))
            names = (name for name in found if format_suffix(name) in suffixes)
            files = InputFiles(path, sorted(names))
        else:
            folder, name = remote_file.split_path(path)
            files = InputFiles(folder, [name])
    if not files.names:
        raise InputError(f"{path}: expected files *{' *'.join(suffixes)} (input), found none")
    return files


def check_output_outside_input(output: Path, path: str) -> None:
    """Checks that a later attempt cannot mistake files in the output folder for input.

    Args:
        output: output folder.
        path: input path, glob or URL.

    Raises:
        InputError: if the output is the input folder, or below it.
    """
    folder, is_deep = path, True
    if remote_file.is_pattern(path):
        folder = remote_file.folder_of_pattern(path)
        is_deep = "/" in path[len(folder) :].lstrip("/")
    local, resolved = remote_file.local_path(folder), output.resolve()
    if local is None or not local.is_dir():
        return
    if resolved == local.resolve() or (is_deep and local.resolve() in resolved.parents):
        raise InputError(
            f"output={output}: expected a folder outside {path} (input), because a later "
            "attempt would read the written files as input; choose another output"
        )


def state_of_files(files: Iterable[remote_file.FoundFile]) -> dict[str, Any]:
    """Summarises files: their number, their total size, and a digest of names and sizes."""
    files = list(files)
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        name = file.name.encode("utf-8", errors="surrogateescape")
        digest.update(b"%s\0%d\n" % (name, -1 if file.num_bytes is None else file.num_bytes))
    return {
        "files": len(files),
        "bytes": sum(file.num_bytes or 0 for file in files),
        "names_and_sizes_sha256": digest.hexdigest(),
    }


def media_root_of(source: PairSource) -> str:
    """Returns the base folder or URL of relative media paths."""
    return input_folder_of(source.input) if source.media_root is None else source.media_root


def input_folder_of(path: str) -> str:
    """Returns the base folder or URL of the names of an input's files."""
    if remote_file.is_pattern(path):
        return remote_file.folder_of_pattern(path)
    if remote_file.is_folder(path):
        return path
    return remote_file.split_path(path)[0]
