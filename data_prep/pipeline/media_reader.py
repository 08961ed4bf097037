"""Reader of the media of items: files, URLs, and bytes in Parquet, Arrow and tar files.

Items are read in order. Remote files are prefetched. Containers are read sequentially, so that only
a small part is in memory at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.config import DownloadOptions
from data_prep.sources.arrow import ArrowMedia
from data_prep.sources.input_files import PairSource, format_of, input_folder_of, media_root_of
from data_prep.sources.item_file import read_item_file
from data_prep.sources.pair import BadItemError, Item
from data_prep.sources.parquet import ParquetMedia
from data_prep.sources.tars import TarMedia
from data_prep.storage import remote_file
from data_prep.workers import map_ahead

if TYPE_CHECKING:
    from data_prep.download.downloader import Downloader

REMOTE_FILES_AHEAD = 16  # for fsspec URLs; web downloads have their own settings
CONTAINERS = {"parquet": ParquetMedia, "huggingface": ArrowMedia}


class MediaReader:
    """Context manager that reads the bytes of items.

    Args:
        source: input that contains the items.
        downloads: folder for files downloaded from the web.
        download: settings for web downloads.
        max_bytes: media above this limit are rejected without being read.
        retried: failed downloads are repeated if they failed for one of these reasons.
        urls_may_repeat: whether several shards may contain the same URL; downloads are then kept.
    """

    def __init__(
        self,
        source: PairSource,
        *,
        downloads: Path,
        download: DownloadOptions,
        max_bytes: int,
        retried: tuple[str, ...] = (),
        urls_may_repeat: bool = False,
    ):
        self.source = source
        self.downloads = downloads
        self.download = download
        self.max_bytes = max_bytes
        self.retried = retried
        self.urls_may_repeat = urls_may_repeat
        self._folder = input_folder_of(source.input)
        self._root = media_root_of(source)
        self._exits = ExitStack()
        self._downloader: Downloader | None = None
        self._urls: list[str] = []  # URLs fetched so far
        # Column, or None -> path and container that is currently open. Samples of modalities read
        # several columns of a container side by side.
        self._containers: dict[str | None, tuple[str, Any]] = {}

    def __enter__(self) -> MediaReader:
        return self

    def __exit__(self, *error: Any) -> None:
        for column in list(self._containers):
            self._close_container(column)
        self._exits.__exit__(*error)

    def read_all(self, items: Sequence[Item]) -> Iterator[tuple[Item, bytes | BadItemError]]:
        """Yields each item with its bytes, or with the error that rejects it.

        Raises:
            InputError, RunError: if a disk, a server or a container currently cannot be read.
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
        """Deletes the files downloaded so far; called when their shard is finished.

        Nothing is deleted if another shard may contain the same URL. The whole folder is deleted
        when the dataset is finished.
        """
        is_kept = self.download.keep or self.urls_may_repeat
        if self._downloader is not None and not is_kept:
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
                    self.download,
                    cache=self.downloads,
                    max_bytes=self.max_bytes,
                    retried=self.retried,
                )
            )
        self._urls += urls
        return self._downloader.fetch_all(urls)

    def _read_file(self, path: str) -> bytes | BadItemError:
        try:
            return read_item_file(path, max_bytes=self.max_bytes)
        except BadItemError as error:
            return error

    def _read_from_container(self, item: Item) -> bytes | BadItemError:
        path = remote_file.join(self._folder, item.media)
        open_path, container = self._containers.get(item.column, ("", None))
        if path != open_path:
            self._close_container(item.column)
            container = self._open_container(path, item.column)
            self._containers[item.column] = path, container
        try:
            return container.read(item.place)
        except BadItemError as error:
            return error

    def _open_container(self, path: str, column: str | None) -> Any:
        file_format = format_of(self.source)
        if file_format == "webdataset":
            return TarMedia(path, max_bytes=self.max_bytes)
        column = column or self.source.columns.media
        return CONTAINERS[file_format](path, column=column, max_bytes=self.max_bytes)

    def _close_container(self, column: str | None) -> None:
        if column in self._containers:
            self._containers.pop(column)[1].close()


def _is_far(path: str) -> bool:
    return remote_file.local_path(path) is None and not remote_file.is_web_url(path)


def _not_empty(content: bytes | BadItemError, item: Item) -> bytes | BadItemError:
    if content == b"":
        return BadItemError("empty_file", f"{item.media}: 0 bytes")
    return content
