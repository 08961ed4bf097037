"""Downloads from a server on this machine, compared with plain urllib3 in a pool of threads.

    python -m tests.benchmarks.downloads

1,000 bodies of 30 kB, 16 threads, best of three, in URLs per second and per CPU second of the
client. Plain urllib3 keeps the bodies as files. It checks no permission, records nothing, shares no
limit with other processes, and accepts any address, time and size.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import urllib3

from data_prep.config import DownloadOptions
from data_prep.download.downloader import Downloader

NUM_URLS = 1000
BODY = bytes(30_000)
NUM_THREADS = 16
NUM_RUNS = 3


def main() -> None:
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe()
    server = context.Process(target=serve, args=(sending,), daemon=True)
    server.start()
    origin = f"http://127.0.0.1:{receiving.recv()}"
    urls = [f"{origin}/{number}.jpg" for number in range(NUM_URLS)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = best(fetch_with_urllib3, urls, folder)
        show("urllib3", theirs, theirs)
        show("isopair", best(fetch_with_isopair, urls, folder), theirs)
        fetch_with_isopair(urls, folder)
        show("isopair, all fetched before", rates(fetch_with_isopair, urls, folder), theirs)
    server.terminate()


def serve(sending: Connection) -> None:
    asyncio.run(serve_forever(sending))


async def serve_forever(sending: Connection) -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    sending.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while True:
            request = await reader.readuntil(b"\r\n\r\n")
            is_there = b"robots.txt" not in request
            status, body = (b"200 OK", BODY) if is_there else (b"404 Not Found", b"")
            head = b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
            writer.write(head + body)
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


def best(
    fetch: Callable[[list[str], Path], None], urls: list[str], folder: Path
) -> tuple[float, float]:
    """Returns the highest rates of several runs, each into an empty folder."""
    runs = []
    for _ in range(NUM_RUNS):
        shutil.rmtree(folder / "cache", ignore_errors=True)
        runs.append(rates(fetch, urls, folder))
    shutil.rmtree(folder / "cache")
    return max(wall for wall, _ in runs), max(cpu for _, cpu in runs)


def rates(
    fetch: Callable[[list[str], Path], None], urls: list[str], folder: Path
) -> tuple[float, float]:
    """Measures URLs per second, and per CPU second."""
    start, start_cpu = time.perf_counter(), time.process_time()
    fetch(urls, folder)
    return (
        NUM_URLS / (time.perf_counter() - start),
        NUM_URLS / (time.process_time() - start_cpu),
    )


def fetch_with_urllib3(urls: list[str], folder: Path) -> None:
    manager = urllib3.PoolManager(maxsize=NUM_THREADS)
    (folder / "cache").mkdir()

    def fetch(numbered: tuple[int, str]) -> bytes:
        path = folder / "cache" / str(numbered[0])
        path.write_bytes(manager.request("GET", numbered[1]).data)
        return path.read_bytes()

    with ThreadPoolExecutor(NUM_THREADS) as executor:
        assert all(content == BODY for content in executor.map(fetch, enumerate(urls)))


def fetch_with_isopair(urls: list[str], folder: Path) -> None:
    options = DownloadOptions(
        private_hosts=True, threads=NUM_THREADS, connections_per_host=NUM_THREADS
    )
    with Downloader(options, cache=folder / "cache", max_bytes=2**20) as downloader:
        assert all(content == BODY for content in downloader.fetch_all(urls))


def show(what: str, ours: tuple[float, float], theirs: tuple[float, float]) -> None:
    print(
        f"{what}: {ours[0]:,.0f} per second, {ours[1]:,.0f} per CPU second: "
        f"{ours[1] / theirs[1]:.2f} times urllib3"
    )


if __name__ == "__main__":
    main()
