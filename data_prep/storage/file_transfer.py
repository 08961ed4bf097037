"""Transfers of whole files from a URL to the disk, retried on transient errors.

A file:// URL is copied; all other schemes (https, s3, gs, hf, ...) use fsspec's `get_file`.
`data_prep.storage.failures` lists the types of errors.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from pathlib import Path

from data_prep.storage.atomic import sha256_of
from data_prep.storage.failures import WrongContentError, with_retries
from data_prep.storage.remote_file import file_system, local_path


def fetch_file(
    url: str,
    path: Path,
    *,
    retries: int,
    num_bytes: int | None = None,
    sha256: str | None = None,
) -> None:
    """Downloads a file in place; use a temporary name and a rename if it must never be partial.

    Args:
        url: URL of any scheme that `remote_file` supports.
        path: file to create or overwrite, in an existing folder.
        retries: number of retries after transient failures.
        num_bytes: expected length, or None if unknown.
        sha256: expected checksum, or None if unknown.

    Raises:
        FileNotFoundError, PermissionError, WrongContentError, OSError: in the same cases as
            `with_retries`.
        InputError: if no library opens URLs with this scheme.
    """

    def fetch() -> None:
        _transfer(url, path)
        _check_content(url, path, num_bytes=num_bytes, sha256=sha256)

    with_retries(url, fetch, retries=retries)


def fetch_bytes(url: str, folder: Path, *, retries: int) -> bytes:
    """Downloads a small file through a temporary file, and returns its content.

    Args:
        url: URL of any scheme that `remote_file` supports.
        folder: existing folder for the temporary file.
        retries: number of retries after transient failures.

    Raises:
        OSError, InputError: in the same cases as `fetch_file`.
    """
    path = folder / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}.{secrets.token_hex(8)}"
    try:
        fetch_file(url, path, retries=retries)
        return path.read_bytes()
    finally:
        path.unlink(missing_ok=True)


def _transfer(url: str, path: Path) -> None:
    local = local_path(url)
    if local is not None:
        shutil.copyfile(local, path)
    else:
        files, inner = file_system(url)
        files.get_file(inner, str(path))


def _check_content(url: str, path: Path, *, num_bytes: int | None, sha256: str | None) -> None:
    found_bytes = path.stat().st_size
    if num_bytes is not None and found_bytes != num_bytes:
        raise WrongContentError(f"{url}: expected {num_bytes} bytes, found {found_bytes}")
    if sha256 is not None and (found := sha256_of(path)) != sha256:
        raise WrongContentError(f"{url}: expected sha256 {sha256}, found {found}")
