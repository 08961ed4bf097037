"""Functions that open, list and join files by local path or URL.

Local paths and file:// URLs are opened directly. All other schemes (https://, s3://, gs://, hf://,
memory://, ...) use fsspec; `web_file` adds resumption to http and https.
"""

from __future__ import annotations

import errno
import glob
import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import quote, unquote, urljoin, urlsplit

from data_prep.errors import InputError

if TYPE_CHECKING:
    from data_prep.storage.web_file import WebFile

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
WILDCARD = re.compile(r"[*?\[]")
BUFFER_BYTES = 1 << 20
URL_CHARACTERS = "/%?&=#+,;@~!$'()*"  # not percent-encoded


class NotAFileError(OSError):
    """A folder, a pipe or a device was found instead of a file."""


class UnknownSchemeError(InputError):
    """A URL has a scheme that no library opens."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file in a folder."""

    name: str  # relative to the folder, with / between its parts
    num_bytes: int | None  # None if not requested, or not reported


def is_url(path: str) -> bool:
    """Returns True if a path starts with a scheme, such as s3://."""
    return URL.match(path) is not None


def is_web_url(path: str) -> bool:
    """Returns True if the scheme is http or https."""
    return path[:8].lower().startswith(("http://", "https://"))


def local_path(path: str) -> Path | None:
    """Returns the path on this machine, or None for a URL other than file://."""
    if _is_file_url(path):  # file://<host>/<path>, where the host is empty or this machine
        return Path("/" + unquote(path[7:].partition("/")[2]))
    return None if is_url(path) else Path(path)


def _is_file_url(path: str) -> bool:
    return path[:7].lower() == "file://"


def is_absolute(path: str) -> bool:
    """Returns True for a URL or a path that starts at the root."""
    return is_url(path) or path.startswith("/")


def join(folder: str, name: str) -> str:
    """Joins a folder and a file name; an absolute path or a URL is returned unchanged."""
    if is_absolute(name):
        return name
    if is_web_url(folder):
        return urljoin(folder.rstrip("/") + "/", quote(name, safe=URL_CHARACTERS))
    if _is_file_url(folder):
        name = name.replace("%", "%25")  # local_path decodes it
    return f"{folder.rstrip('/')}/{name}" if folder.strip("/") else folder + name


def split_path(path: str) -> tuple[str, str]:
    """Splits a path into (folder, name) for `join`; the name in a web URL keeps its query."""
    end = len(path) if not is_web_url(path) else len(path.partition("?")[0])
    folder, _, _ = path[:end].rpartition("/")
    if not folder and not path.startswith("/"):
        return ".", path
    name = path[len(folder) + 1 :]
    return folder or "/", unquote(name) if _is_file_url(path) else name


def suffix_of(path: str) -> str:
    """Returns the extension in lower case, with its dot."""
    name = urlsplit(path).path if is_web_url(path) else path
    return posixpath.splitext(name)[1].lower()


def points_outside(name: str) -> bool:
    """Returns True if a relative path points outside its starting folder."""
    return posixpath.normpath(name).split("/")[0] == ".."


# ------------------------------------------------------------------------------------- one file


def open_binary(path: str) -> BinaryIO:
    """Opens a file for buffered, seekable reading.

    Raises:
        OSError: if the file is missing, or currently cannot be read.
        InputError: if no library for the URL scheme is installed.
    """
    local = local_path(path)
    if local is not None:
        return _open_regular(local)
    if is_web_url(path):
        return io.BufferedReader(_open_web(path), BUFFER_BYTES)
    files, inner = file_system(path)
    return io.BufferedReader(files.open(inner, "rb"), BUFFER_BYTES)


def _open_regular(path: Path) -> BinaryIO:
    # Opening a pipe could block, and a device must not be read.
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotAFileError(errno.EINVAL, "not a regular file", str(path))
    return open(path, "rb", opener=_open_nonblocking)


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_bytes(path: str, *, max_bytes: int | None = None) -> bytes:
    """Reads a whole file, or at most `max_bytes` + 1 bytes.

    Raises:
        OSError, InputError: in the same cases as `open_binary`.
    """
    with open_binary(path) as file:
        return file.read(-1 if max_bytes is None else max_bytes + 1)


def size_of(path: str) -> int | None:
    """Returns the size of a file in bytes, or None if a server does not report it.

    Raises:
        OSError, InputError: in the same cases as `open_binary`.
    """
    local = local_path(path)
    if local is not None:
        return local.stat().st_size
    if is_web_url(path):
        with _open_web(path) as file:
            return file.num_bytes
    files, inner = file_system(path)
    return files.info(inner).get("size")


def file_system(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a URL, and the path in that file system.

    Raises:
        UnknownSchemeError: if no library opens URLs with this scheme.
        InputError: if the library for this scheme is not installed.
    """
    import fsspec

    try:
        if is_web_url(url):
            from data_prep.storage.web_file import percent_encoded, web_file_system

            return web_file_system(), percent_encoded(url)
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url}: {error}; or copy the files to a local folder") from None
    except ValueError as error:
        raise UnknownSchemeError(
            f"{url}: expected a path or a URL that fsspec can open: {error}"
        ) from None


def _open_web(url: str) -> WebFile:
    from data_prep.storage.web_file import WebFile

    return WebFile(url, *file_system(url))


# ----------------------------------------------------------------------------------- many files


def is_folder(path: str) -> bool:
    """Returns True if a folder of this name exists; always False for web URLs."""
    local = local_path(path)
    if local is not None:
        return local.is_dir()
    if is_web_url(path):
        return False
    files, inner = file_system(path)
    return files.isdir(inner)


def exists(path: str) -> bool:
    """Returns True if a file or folder of this name exists."""
    local = local_path(path)
    if local is not None:
        return local.exists()
    if is_web_url(path):
        try:
            size_of(path)
        except FileNotFoundError:
            return False
        return True
    files, inner = file_system(path)
    return files.exists(inner)


def list_files(folder: str, *, with_sizes: bool = False) -> Iterator[FoundFile]:
    """Yields all files below a folder, in any order, except hidden files and folders.

    Everything except a folder counts as a file, including a broken link. Links to folders are
    followed, unless they point to a folder that contains them.

    Raises:
        OSError: if a folder cannot be read.
    """
    local = local_path(folder)
    if local is not None:
        yield from _walk(str(local), "", with_sizes=with_sizes, ancestors=())
        return
    files, inner = file_system(folder)
    inner = inner.rstrip("/")
    for path, info in files.find(inner, detail=True).items():
        name = path[len(inner) :].lstrip("/")
        if not any(part.startswith(".") for part in name.split("/")):
            yield FoundFile(name, info.get("size"))


def _walk(
    folder: str, prefix: str, *, with_sizes: bool, ancestors: tuple[tuple[int, int], ...]
) -> Iterator[FoundFile]:
    status = os.stat(folder)  # noqa: PTH116
    identity = (status.st_dev, status.st_ino)
    if identity in ancestors:
        return
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                yield FoundFile(prefix + entry.name, _entry_size(entry) if with_sizes else None)
    for name in folders:
        yield from _walk(
            f"{folder}/{name}",
            f"{prefix}{name}/",
            with_sizes=with_sizes,
            ancestors=(*ancestors, identity),
        )


def _entry_size(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_size
    except FileNotFoundError:  # a broken link
        return None


def is_pattern(path: str) -> bool:
    """Returns True if a path has wildcards and no file has exactly this name."""
    if is_web_url(path) or not WILDCARD.search(path):
        return False
    return not exists(path)


def folder_of_pattern(pattern: str) -> str:
    """Returns the path before the first component with a wildcard."""
    start = WILDCARD.search(pattern).start()
    return pattern[:start].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")


def glob_files(pattern: str) -> tuple[str, list[str]]:
    """Finds the files that match a pattern, in which `**` matches any number of folders.

    Returns:
        The folder before the first wildcard, and the sorted names relative to it.
    """
    folder = folder_of_pattern(pattern)
    local = local_path(folder)
    if local is not None:
        below = pattern if folder == "." else pattern[len(folder) :].lstrip("/")
        names = glob.glob(below, root_dir=local, recursive=True)  # noqa: PTH207
        return folder, sorted(name for name in names if not (local / name).is_dir())
    files, inner = file_system(pattern)
    _, inner_folder = file_system(folder)
    paths = [path for path, info in files.glob(inner, detail=True).items() if _is_file(info)]
    return folder, sorted(path[len(inner_folder.rstrip("/")) :].lstrip("/") for path in paths)


def _is_file(info: dict[str, Any]) -> bool:
    return info.get("type") == "file"
