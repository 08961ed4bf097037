"""Downloads media by URL: prefetches with threads, yields in order, and fetches each URL once.

    with Downloader(options, cache=folder, max_bytes=2**28) as downloader:
        for media in downloader.fetch_all(urls):
            ...                                 # bytes, or a BadItemError with the reason
        downloader.forget(urls)

The cache records the outcome for each URL, for all processes and later attempts. A URL is fetched
again only
- if its body was deleted
- if it failed in an earlier attempt, either for a transient reason (with retry_failed=true) or for
  a reason listed in `retried`
- if it was rejected as too large with a smaller max_bytes.

After changing any other option, a new cache folder is required.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from urllib3 import BaseHTTPResponse

from data_prep.config import DownloadOptions
from data_prep.download.address import DownloadError, WebAddress, parse_address
from data_prep.download.cache import DownloadCache, FetchRecord
from data_prep.download.connection import ConnectionWatch
from data_prep.download.fetch import WebFetcher
from data_prep.download.robots import ROBOTS_TXT_BYTES, RobotsTxt, check_opt_out
from data_prep.errors import RunError
from data_prep.sources.pair import BadItemError

URLS_AHEAD = 4  # prefetched URLs per thread; enough that a slow host does not delay others
SHUTDOWN_SECONDS = 1.0  # maximum time that closing waits for the threads


@dataclass(eq=False)
class _Job:
    """A URL that a thread will fetch."""

    url: str
    host: str
    record: Future[FetchRecord] = field(default_factory=Future)


class Downloader:
    """Context manager that fetches media; one per process, used by one thread.

    Args:
        options: limits and crawling policy.
        cache: folder of the cache, shared by all processes of a run.
        max_bytes: maximum length of a body.
        retried: failed URLs are fetched again if they failed for one of these reasons.
    """

    def __init__(
        self,
        options: DownloadOptions,
        *,
        cache: Path,
        max_bytes: int,
        retried: Collection[str] = (),
    ):
        self._options = options
        self._retried = retried
        self._max_bytes = max_bytes
        self._begun = time.time()
        self._watch = ConnectionWatch()
        self._cache = DownloadCache(cache, closed=self._watch.closed)
        self._fetcher = WebFetcher(options, cache=self._cache, watch=self._watch)
        self._robots_txt = RobotsTxt(options.user_agent, read=self._read_robots_txt)
        self._jobs: deque[_Job] = deque()  # jobs that wait for a thread
        self._jobs_of_host: Counter[str] = Counter()  # running jobs per host
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Downloader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Aborts all connections immediately, and discards partial bodies."""
        self._watch.close()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(SHUTDOWN_SECONDS / len(self._threads))
        self._fetcher.close()
        if not any(thread.is_alive() for thread in self._threads):
            self._cache.close()

    def fetch_all(self, urls: Sequence[str]) -> Iterator[bytes | BadItemError]:
        """Yields the body or error of each URL, in order, and prefetches later URLs.

        Only one body is in memory at a time; the others are on disk.

        Raises:
            RunError: if the disk is full or an I/O error occurs.
        """
        self._start_threads(len(urls))
        remaining = iter(urls)
        ahead: deque[_Job] = deque()
        jobs: dict[str, _Job] = {}  # by URL, so that duplicates share a download
        try:
            while True:
                while len(ahead) < URLS_AHEAD * self._options.threads:
                    url = next(remaining, None)
                    if url is None:
                        break
                    if url not in jobs:
                        jobs[url] = self._submit(url)
                    ahead.append(jobs[url])
                if not ahead:
                    return
                job = ahead.popleft()
                if all(other is not job for other in ahead):
                    del jobs[job.url]
                yield self._result(job)
        finally:
            self._withdraw(jobs.values())

    def forget(self, urls: Iterable[str]) -> None:
        """Deletes the bodies of URLs; keeps the records, so that failed URLs are not repeated."""
        for url in urls:
            self._cache.forget_body(url)

    def _result(self, job: _Job) -> bytes | BadItemError:
        record = job.record.result()
        try:
            return self._content(job.url, record)
        except DownloadError as error:
            return error.with_traceback(None)

    # ----------------------------------------------------------------------------------- threads

    def _submit(self, url: str) -> _Job:
        try:
            host = parse_address(url).host
        except DownloadError as error:
            job = _Job(url, host="")
            job.record.set_result(FetchRecord(reason=error.reason, detail=error.detail))
            return job
        job = _Job(url, host)
        with self._changed:
            self._jobs.append(job)
            self._changed.notify()
        return job

    def _withdraw(self, jobs: Iterable[_Job]) -> None:
        withdrawn = set(jobs)
        with self._changed:
            self._jobs = deque(job for job in self._jobs if job not in withdrawn)

    def _start_threads(self, num_urls: int) -> None:
        while len(self._threads) < min(self._options.threads, num_urls):
            thread = threading.Thread(target=self._run_jobs, daemon=True, name="download")
            self._threads.append(thread)
            thread.start()

    def _run_jobs(self) -> None:
        while (job := self._take()) is not None:
            try:
                job.record.set_result(self._obtain(job.url))
            except Exception as error:
                job.record.set_exception(error)
            with self._changed:
                self._jobs_of_host[job.host] -= 1
                self._changed.notify()

    def _take(self) -> _Job | None:
        """Takes the first job whose host has a free connection; None after closing."""
        with self._changed:
            while not self._watch.closed.is_set():
                for job in self._jobs:
                    if self._jobs_of_host[job.host] < self._options.connections_per_host:
                        self._jobs.remove(job)
                        self._jobs_of_host[job.host] += 1
                        return job
                self._changed.wait()
        return None

    # ---------------------------------------------------------------------------------- one URL

    def _obtain(self, url: str, *, is_robots_txt: bool = False) -> FetchRecord:
        """Returns the record of a URL after fetching the URL if necessary."""
        with self._cache.url_lock(url):
            record = self._cache.read_record(url)
            retried = () if is_robots_txt else self._retried  # many sites have no robots.txt
            if record is not None and self._is_final(url, record, retried=retried):
                return record
            record = self._fetcher.fetch(
                url,
                self._cache.body_path(url),
                max_bytes=ROBOTS_TXT_BYTES if is_robots_txt else self._max_bytes,
                cut=is_robots_txt,
                check_address=_allow if is_robots_txt else self._check_address,
                check_response=_allow if is_robots_txt else self._check_response,
            )
            self._cache.write_record(url, record)
            return record

    def _content(self, url: str, record: FetchRecord, *, is_robots_txt: bool = False) -> bytes:
        """Returns the body of a URL, or raises its DownloadError."""
        for _ in range(2):
            if record.reason is not None:
                raise DownloadError(
                    record.reason,
                    record.detail,
                    is_transient=record.is_transient,
                    status=record.status,
                )
            content = self._cache.read_body(url, record)
            if content is not None:
                return content
            self._cache.forget_body(url)  # truncated by a power failure
            record = self._obtain(url, is_robots_txt=is_robots_txt)
        raise RunError(
            f"{self._cache.folder}: a finished download was deleted by another program; prevent "
            "this, and run the same command again"
        )

    def _is_final(self, url: str, record: FetchRecord, *, retried: Collection[str]) -> bool:
        if record.reason is None:
            return self._cache.has_body(url)
        if record.reason == "download_too_large":
            return record.max_bytes >= self._max_bytes
        is_retried = record.is_transient and self._options.retry_failed
        is_retried |= record.reason in retried
        return not (is_retried and record.time < self._begun)

    def _check_address(self, address: WebAddress) -> None:
        if self._options.obey_robots_txt:
            self._robots_txt.check(address)

    def _check_response(self, response: BaseHTTPResponse) -> None:
        if self._options.obey_opt_out_headers:
            check_opt_out(response.headers, user_agent=self._options.user_agent)

    def _read_robots_txt(self, url: str) -> bytes:
        return self._content(url, self._obtain(url, is_robots_txt=True), is_robots_txt=True)


def _allow(_: object) -> None:
    """Allows everything, because reading robots.txt needs no permission."""
