"""Shortcuts that read the pairs and media of an input, and a web server, for tests of sources."""

import threading
import zlib
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from data_prep.config import MakeShards
from data_prep.pipeline.media_reader import MediaReader
from data_prep.sources.formats import read_pairs
from data_prep.sources.input_files import PairSource
from data_prep.sources.pair import BadItemError, Item, Pair


def config_of(path: Path | str, **fields) -> MakeShards:
    """Returns a config that reads pictures from `path`."""
    fields = {"media": "image", "output": Path("unused")} | fields
    return MakeShards(input=str(path), **fields)


def source_of(path: Path | str, **fields) -> PairSource:
    """Returns the source of pictures at `path`."""
    return PairSource.from_config(config_of(path, **fields))


def pairs_of(source: Path | str, **fields) -> list[Pair]:
    """Reads the pairs of an input."""
    return list(read_pairs(source_of(source, **fields)))


def reasons_of(source: Path | str, **fields) -> dict[int, str | None]:
    """Returns row -> reason for an input with one pair per row."""
    return {pair.row: pair.reason for pair in pairs_of(source, **fields)}


def contents_of(
    path: Path | str,
    pairs: list[Pair] | None = None,
    *,
    downloads: Path = Path(),
    **fields,
) -> list[bytes | str]:
    """Returns the media of every pair: its bytes, or the reason why there are none."""
    config = config_of(path, **fields)
    source = PairSource.from_config(config)
    pairs = list(read_pairs(source)) if pairs is None else pairs
    items = [Item(number, p.media, p.place, [p]) for number, p in enumerate(pairs)]
    reader = MediaReader(
        source,
        downloads=downloads,
        download=config.download,
        max_bytes=config.max_media_bytes,
    )
    with reader:
        found = list(reader.read_all(items))
    assert [item for item, _ in found] == items
    return [c.reason if isinstance(c, BadItemError) else c for _, c in found]


class Handler(BaseHTTPRequestHandler):
    """Serves `files`, with range requests; closes the connection after `most_bytes`."""

    files: dict[str, bytes] = {}
    failures: list[int] = []  # statuses of the next answers, from the last to the first
    knows_ranges = True
    most_bytes = 1 << 30

    def do_GET(self):
        if self.failures:
            self.send_error(self.failures.pop())
            return
        content = self.files.get(self.path)
        if content is None:
            self.send_error(403 if "secret" in self.path else 404)
            return
        first, last, status = 0, len(content) - 1, 200
        tag = f'"{zlib.crc32(content)}"'
        asked = self.headers.get("Range")
        if self.knows_ranges and asked and self.headers.get("If-Range", tag) == tag:
            begin, end = asked.removeprefix("bytes=").split("-")
            first, last, status = int(begin), min(int(end or last), last), 206
        self.send_response(status)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", tag)
        self.end_headers()
        self.wfile.write(content[first : last + 1][: self.most_bytes])

    def log_message(self, *_):
        pass


@contextmanager
def served(files: dict[str, bytes], **attributes):
    """Yields the root URL of a local web server with the given files: path -> content."""
    handler = type("TestHandler", (Handler,), {"files": files, **attributes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
