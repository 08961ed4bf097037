"""Files by path or by URL: one way to open, list and join them.

Local paths, and file:// URLs, go straight to the operating system; http and https go through
web_file; every other scheme (s3://, gs://, hf://, memory://, ...) goes through fsspec.
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
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urljoin, urlsplit

from data_prep.errors import InputError

URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
WILDCARD = re.compile(r"[*?\[]")
BUFFER_BYTES = 1 << 20


class NotAFileError(OSError):
    """A folder, a pipe or a device stands where a file was expected."""


class UnknownSchemeError(InputError):
    """A URL of a scheme that no library opens."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file in a folder."""

    name: str  # from the folder, with / between its parts
    num_bytes: int | None  # None: not asked for, or not told


def is_url(path: str) -> bool:
    """Whether it starts with a scheme, such as s3://."""
    return URL.match(path) is not None


def is_web_url(path: str) -> bool:
    """Whether its scheme is http or https."""
    return path[:8].lower().startswith(("http://", "https://"))


def local_path(path: str) -> Path | None:
    """The path on this machine; None for URLs of other schemes than file://."""
    if _is_file_url(path):  # then a host, which is this one, and the path
        return Path("/" + unquote(path[7:].partition("/")[2]))
    return None if is_url(path) else Path(path)


def _is_file_url(path: str) -> bool:
    return path[:7].lower() == "file://"


def is_absolute(path: str) -> bool:
    """Whether it is a URL or starts at the root."""
    return is_url(path) or path.startswith("/")


def join(folder: str, name: str) -> str:
    """The path or URL of a file in a folder; an absolute path or a URL stays as it is."""
    if is_absolute(name):
        return name
    if is_web_url(folder):
        return urljoin(folder.rstrip("/") + "/", quote(name, safe="/%?&=#+,;@~!$'()*"))
    if _is_file_url(folder):
        name = name.replace("%", "%25")  # local_path decodes it
    return f"{folder.rstrip('/')}/{name}" if folder.strip("/") else folder + name


def split_path(path: str) -> tuple[str, str]:
    """(folder, name) of a file, which `join` joins; the name of a web address keeps its query."""
    end = len(path) if not is_web_url(path) else len(path.partition("?")[0])
    folder, _, _ = path[:end].rpartition("/")
    if not folder and not path.startswith("/"):
        return ".", path
    name = path[len(folder) + 1 :]
    return folder or "/", unquote(name) if _is_file_url(path) else name


def suffix_of(path: str) -> str:
    """The extension in lower case, with its dot."""
    name = urlsplit(path).path if is_web_url(path) else path
    return posixpath.splitext(name)[1].lower()


def leads_outside(name: str) -> bool:
    """Whether a relative path leads out of the folder that it starts in."""
    return posixpath.normpath(name).split("/")[0] == ".."


# ------------------------------------------------------------------------------------- one file


def open_binary(path: str) -> BinaryIO:
    """The opened file, buffered, which can seek.

    Raises:
        OSError: it is missing, or cannot be read now.
        InputError: no library for this scheme is installed.
    """
    local = local_path(path)
    if local is not None:
        return _open_regular(local)
    if is_web_url(path):
        from data_prep.storage.web_file import WebFile

        return io.BufferedReader(WebFile(path), BUFFER_BYTES)
    files, inner = file_system(path)
    return io.BufferedReader(files.open(inner, "rb"), BUFFER_BYTES)


def _open_regular(path: Path) -> BinaryIO:
    """Never waits for the other end of a pipe, and opens no device."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise NotAFileError(errno.EINVAL, "no ordinary file", str(path))
    return open(path, "rb", opener=_open_at_once)


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def read_bytes(path: str, *, max_bytes: int | None = None) -> bytes:
    """The whole content; with `max_bytes`, never more than one byte beyond it.

    Raises:
        OSError, InputError: as open_binary.
    """
    with open_binary(path) as file:
        return file.read(-1 if max_bytes is None else max_bytes + 1)


def size_of(path: str) -> int | None:
    """Bytes of a file; None where a server does not tell.

    Raises:
        OSError, InputError: as open_binary.
    """
    local = local_path(path)
    if local is not None:
        return local.stat().st_size
    if is_web_url(path):
        from data_prep.storage.web_file import WebFile

        with WebFile(path) as file:
            return file.num_bytes
    files, inner = file_system(path)
    return files.info(inner).get("size")


def file_system(url: str) -> tuple[Any, str]:
    """(fsspec's file system of a URL, path in it).

    Raises:
        UnknownSchemeError: no library opens such URLs.
        InputError: the library that opens them is not installed.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url}: {error}; or copy the files to a local folder") from None
    except ValueError as error:
        raise UnknownSchemeError(
            f"{url}: expected a path or a URL that fsspec can open: {error}"
        ) from None


# ----------------------------------------------------------------------------------- many files


def is_folder(path: str) -> bool:
    """Whether there is a folder of this name; never for web addresses."""
    local = local_path(path)
    if local is not None:
        return local.is_dir()
    if is_web_url(path):
        return False
    files, inner = file_system(path)
    return files.isdir(inner)


def exists(path: str) -> bool:
    """Whether there is a file or folder of this name."""
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
    """All files below a folder, in no order, but hidden ones and those in hidden folders.

    Whatever is no folder counts as a file, also a link that leads nowhere. Links to folders are
    followed, except back to a folder they are in.

    Raises:
        OSError: a folder cannot be read.
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
    except FileNotFoundError:  # a link that leads nowhere
        return None


def is_pattern(path: str) -> bool:
    """Whether it holds wildcards and no file of just this name is there."""
    if is_web_url(path) or not WILDCARD.search(path):
        return False
    return not exists(path)


def folder_of_pattern(pattern: str) -> str:
    """The path before the first part that holds a wildcard."""
    start = WILDCARD.search(pattern).start()
    return pattern[:start].rpartition("/")[0] or ("/" if pattern.startswith("/") else ".")


def glob_files(pattern: str) -> tuple[str, list[str]]:
    """(folder before the first wildcard, sorted names from it) of the files that match.

    `**` stands for any number of folders.
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
