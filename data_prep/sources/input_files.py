"""Finds the files that an input stands for, and their format.

input: file, folder, glob or URL -> format_of -> files_of_input: a folder and sorted names in it
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data_prep.config import MakeShards
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
MAX_ENTRIES_LOOKED_AT = 10_000  # of a folder whose format is to be found


# Which files and members may be media; what they really hold is decided by their content.
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
class InputFiles:
    """The files of an input, in the order in which they are read."""

    folder: str  # path or URL
    names: list[str]  # from the folder

    def path_of(self, name: str) -> str:
        """Path or URL of one of them."""
        return remote_file.join(self.folder, name)


@contextlib.contextmanager
def readable_input(path: str) -> Iterator[None]:
    """Turns what can be wrong with a file that the user names into an InputError.

    Raises:
        InputError: naming the file.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{path}: not readable: {error.strerror or error}") from None


def format_of(config: MakeShards) -> str:
    """The input's format: as configured, else found from its name and content.

    Raises:
        InputError: there is no input, or its format cannot be told.
    """
    if config.format != "auto":
        return config.format
    path = config.input
    with readable_input(path):
        if remote_file.is_pattern(path):
            folder, names = remote_file.glob_files(path)
            return _format_of_names([remote_file.join(folder, name) for name in names], path)
        if remote_file.is_folder(path):
            return _format_of_folder(config)
        if not remote_file.is_web_url(path) and not remote_file.exists(path):
            raise _no_input(path)
    return _format_of_names([path], path)


def _no_input(path: str) -> InputError:
    return InputError(f"{path}: expected a manifest or a folder of pairs (input), found nothing")


def _format_of_names(paths: list[str], given: str) -> str:
    suffixes = sorted({remote_file.suffix_of(path) for path in paths})
    if not suffixes:
        raise _no_input(given)
    if len(suffixes) > 1 or suffixes[0] not in FORMAT_OF_SUFFIX:
        raise InputError(
            f"{given}: expected one of {' '.join(FORMAT_OF_SUFFIX)} or a folder (input), found "
            f"{' '.join(suffix or 'no extension' for suffix in suffixes)}; name the format with "
            "format="
        )
    return FORMAT_OF_SUFFIX[suffixes[0]]


def _format_of_folder(config: MakeShards) -> str:
    """A folder of tars may hold Parquets and statistics beside them, as img2dataset writes."""
    if remote_file.exists(remote_file.join(config.input, "dataset.json")):
        return "webdataset"
    for name in ("dataset_dict.json", "state.json"):
        if remote_file.exists(remote_file.join(config.input, name)):
            return "huggingface"
    entries = islice(remote_file.list_files(config.input), MAX_ENTRIES_LOOKED_AT)
    suffixes = {remote_file.suffix_of(entry.name) for entry in entries}
    for suffix in (".tar", ".parquet"):
        if suffix in suffixes:
            return FORMAT_OF_SUFFIX[suffix]
    return "folder" if config.caption_template == "{}" else "class_folders"


def files_of_input(config: MakeShards, file_format: str) -> InputFiles:
    """The files of an input that is one file, a glob, or a folder to look through.

    Args:
        config: whose input is looked for.
        file_format: which tells what files in a folder must end with.

    Raises:
        InputError: there is none.
    """
    path = config.input
    suffixes = [s for s, of_suffix in FORMAT_OF_SUFFIX.items() if of_suffix == file_format]
    with readable_input(path):
        if remote_file.is_pattern(path):
            files = InputFiles(*remote_file.glob_files(path))
        elif remote_file.is_folder(path):
            found = (file.name for file in remote_file.list_files(path))
            names = (name for name in found if remote_file.suffix_of(name) in suffixes)
            files = InputFiles(path, sorted(names))
        else:
            folder, name = remote_file.split_path(path)
            files = InputFiles(folder, [name])
    if not files.names:
        raise InputError(f"{path}: expected files *{' *'.join(suffixes)} (input), found none")
    return files


def check_output_apart(config: MakeShards) -> None:
    """Checks that what is written into the output is not taken for input by a later attempt.

    Raises:
        InputError: the output is the folder that is looked through, or below it.
    """
    folder, is_deep = config.input, True
    if remote_file.is_pattern(config.input):
        folder = remote_file.folder_of_pattern(config.input)
        is_deep = "/" in config.input[len(folder) :].lstrip("/")
    local, output = remote_file.local_path(folder), config.output.resolve()
    if local is None or not local.is_dir():
        return
    if output == local.resolve() or (is_deep and local.resolve() in output.parents):
        raise InputError(
            f"output={config.output}: expected a folder outside of {config.input} (input), where "
            "the files that are written would be taken for input; choose another output"
        )


def state_of_files(files: Iterable[remote_file.FoundFile]) -> dict[str, Any]:
    """How many files there are, and of which names and sizes, in few words."""
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


def media_root_of(config: MakeShards) -> str:
    """The folder or URL from which relative media paths start."""
    return input_folder_of(config) if config.media_root is None else config.media_root


def input_folder_of(config: MakeShards) -> str:
    """The folder or URL from which the names of the input's files start."""
    if remote_file.is_pattern(config.input):
        return remote_file.folder_of_pattern(config.input)
    if remote_file.is_folder(config.input):
        return config.input
    return remote_file.split_path(config.input)[0]
