"""Downloads evaluation sets from URLs into the user's cache, file by file, each file once.

The cache is $XDG_CACHE_HOME/isopair/evaluation_sets (default: ~/.cache/isopair). A set is an output
of data_prep, or tars in clip_benchmark's layout. The URL may also be the page of a Hugging Face
dataset, such as https://huggingface.co/datasets/clip-benchmark/wds_vtab-cifar10.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from tqdm import tqdm

from data_prep.errors import (
    InputError,
    RunError,
)
from data_prep.shards.manifest import read_dataset_files
from data_prep.storage.file_names import readable_part
from data_prep.storage.file_transfer import fetch_file
from data_prep.storage.remote_file import is_url, join
from eval.datasets.tar_dataset import CLASS_NAMES, NUM_TARS, TEMPLATES, TYPE

RETRIES = 5
HUGGING_FACE_PAGE = re.compile(r"(https://huggingface\.co/datasets/[^/]+/[^/]+)(/tree/([^/]+))?/?$")


def cached_copy(location: str) -> Path:
    """Returns the local folder of a dataset, even if it has not been fetched yet."""
    if not is_url(location):
        return Path(location)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "isopair"
    name = readable_part(location.rstrip("/").rpartition("/")[2])
    return (
        cache / "evaluation_sets" / f"{name}_{hashlib.sha256(location.encode()).hexdigest()[:16]}"
    )


def is_fetched(location: str, *, split: str) -> bool:
    """Returns whether a dataset is on this machine."""
    copy = cached_copy(location)
    return not is_url(location) or (copy / f".{split}.complete").exists()


def fetch_dataset(location: str, *, split: str) -> None:
    """Fetches the missing files of the dataset at a URL; does nothing for a path.

    Raises:
        InputError: if there is no dataset at the URL.
        RunError: if the network or the server fails at every attempt; fetched files are kept.
    """
    if is_fetched(location, split=split):
        return
    url, copy = _folder_url(location), cached_copy(location)
    try:
        names = _names_of_shards(url, copy) or _names_of_tars(url, copy, split)
        for name in tqdm(names, desc=f"fetching {location}", unit="file", disable=None):
            _fetch(url, copy, name)
    except FileNotFoundError as error:
        raise InputError(f"{location}: expected a dataset: {error}") from None
    except OSError as error:
        raise RunError(f"{location}: {error}; run the command again to fetch the rest") from None
    (copy / f".{split}.complete").touch()


def _folder_url(location: str) -> str:
    page = HUGGING_FACE_PAGE.match(location)
    return f"{page[1]}/resolve/{page[3] or 'main'}" if page else location


def _names_of_shards(url: str, copy: Path) -> list[str]:
    """Lists the files of Isopair shards; empty if the URL is not that of Isopair shards."""
    if not _fetch_if_there(url, copy, "dataset.json"):
        return []
    _fetch(url, copy, "manifest.jsonl")
    names = [row.name for row in read_dataset_files(copy)[1]]
    return [f"{name}{suffix}" for name in names for suffix in (".tar", ".idx")]


def _names_of_tars(url: str, copy: Path, split: str) -> list[str]:
    for name in (CLASS_NAMES, TEMPLATES, TYPE):
        _fetch_if_there(url, copy, name)
    counted = f"{split}/{NUM_TARS}"
    _fetch(url, copy, counted)
    return [f"{split}/{number}.tar" for number in range(int((copy / counted).read_text()))]


def _fetch_if_there(url: str, copy: Path, name: str) -> bool:
    try:
        _fetch(url, copy, name)
    except FileNotFoundError:
        return False
    return True


def _fetch(url: str, copy: Path, name: str) -> None:
    path = copy / name
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        fetch_file(join(url, name), partial, retries=RETRIES)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
