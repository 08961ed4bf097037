"""Reads the media of items, wherever they are: files, URLs, or inside Parquet, Arrow and tar files.

Items come and go in order. What is far away is fetched ahead; containers are read front to back, so
that little of them is in memory at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import MakeShards
from data_prep.sources.arrow import ArrowMedia
from data_prep.sources.input_files import format_of, input_folder_of, media_root_of
from data_prep.sources.item_file import read_item_file
from data_prep.sources.pair import BadItemError, Item
from data_prep.sources.parquet import ParquetMedia
from data_prep.sources.tars import TarMedia
from data_prep.storage import remote_file
from data_prep.workers import map_ahead

if TYPE_CHECKING:
    from data_prep.download.downloader import Downloader

REMOTE_FILES_AHEAD = 16  # of fsspec URLs; downloads from the web have their own settings
CONTAINERS = {"parquet": ParquetMedia, "huggingface": ArrowMedia}


class MediaReader:
    """The bytes of items; a context manager.

    Args:
        config: input, media_root, max_media_bytes, download and remake.
        downloads: folder for what is fetched from the web.
    """

    def __init__(self, config: MakeShards, downloads: Path):
        self.config = config
        self.downloads = downloads
        self._folder = input_folder_of(config)
        self._root = media_root_of(config)
        self._exits = ExitStack()
        self._downloader: Downloader | None = None
        self._urls: list[str] = []  # fetched so far
        self._container: Any = None  # the open one
        self._container_path = ""

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, *error: Any) -> None:
        self._close_container()
        self._exits.__exit__(*error)

    def read_all(self, items: Sequence[Item]) -> Iterator[tuple[Item, bytes | BadItemError]]:
        """Each item with its bytes, or with what is wrong with it.

        Raises:
            InputError, RunError: a disk, a server or a container cannot be read now.
        """
        paths = [None if item.place is not None else self._path_of(item) for item in items]
        web = self._fetch([path for path in paths if path and remote_file.is_web_url(path)])
        far = [path for path in paths if path and _is_far(path)]
        with closing(map_ahead(self._read_file, far, ahead=REMOTE_FILES_AHEAD)) as remote:
            for item, path in zip(items, paths, strict=True):
                if path is None:
                    content = self._read_from_container(item)
                elif remote_file.is_web_url(path):
                    content = next(web)
                else:
                    content = next(remote) if _is_far(path) else self._read_file(path)
                yield item, _not_empty(content, item)

    def forget_downloads(self) -> None:
        """Deletes what was fetched from the web so far, when its shard is finished.

        Nothing is deleted where another shard may hold the same URL; the whole folder goes when the
        dataset is finished.
        """
        may_share = self.config.captions_per_item == "row"
        if self._downloader is not None and not self.config.download.keep and not may_share:
            self._downloader.forget(self._urls)
        self._urls = []

    def _path_of(self, item: Item) -> str:
        return remote_file.join(self._root, item.media)

    def _fetch(self, urls: list[str]) -> Iterator[bytes | BadItemError]:
        if not urls:
            return iter(())
        if self._downloader is None:
            from data_prep.download.downloader import Downloader

            self._downloader = self._exits.enter_context(
                Downloader(
                    self.config.download,
                    cache=self.downloads,
                    max_bytes=self.config.max_media_bytes,
                    retried=self.config.remake,
                )
            )
        self._urls += urls
        return self._downloader.fetch_all(urls)

    def _read_file(self, path: str) -> bytes | BadItemError:
        try:
            return read_item_file(path, max_bytes=self.config.max_media_bytes)
        except BadItemError as error:
            return error

    def _read_from_container(self, item: Item) -> bytes | BadItemError:
        path = remote_file.join(self._folder, item.media)
        if path != self._container_path:
            self._close_container()
            self._container = self._open_container(path)
            self._container_path = path
        try:
            return self._container.read(item.place)
        except BadItemError as error:
            return error

    def _open_container(self, path: str) -> Any:
        max_bytes = self.config.max_media_bytes
        file_format = format_of(self.config)
        if file_format == "webdataset":
            return TarMedia(path, max_bytes=max_bytes)
        column = self.config.columns.media
        return CONTAINERS[file_format](path, column=column, max_bytes=max_bytes)

    def _close_container(self) -> None:
        if self._container is not None:
            self._container.close()
        self._container, self._container_path = None, ""


def _is_far(path: str) -> bool:
    return remote_file.local_path(path) is None and not remote_file.is_web_url(path)


def _not_empty(content: bytes | BadItemError, item: Item) -> bytes | BadItemError:
    if content == b"":
        return BadItemError("empty_file", f"{item.media}: 0 bytes")
    return content
