"""Runs tasks in this process, in worker processes or in threads, and yields their results.

Worker processes are spawned, never forked. They end when their parent is killed, so that no orphan
writes into a folder that another attempt has taken over.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import wait
from typing import TypeVar

from data_prep.errors import RunError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")
TASKS_AHEAD = 2  # per worker: enough to keep all busy
ValueT = TypeVar("ValueT")


def run_tasks(
    function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT], *, workers: int
) -> Iterator[ResultT]:
    """Yields the result of every task, in any order.

    Args:
        function: function defined at the top of a module, so that other processes can import it.
        tasks: arguments of the calls.
        workers: number of processes; 1 runs everything in this process.

    Raises:
        RunError: if a worker process was killed, most often because memory ran out.
    """
    if workers == 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    remaining = iter(tasks)
    with _executor(min(workers, len(tasks))) as executor:
        running: set[Future[ResultT]] = set()
        while True:
            free_slots = TASKS_AHEAD * workers - len(running)
            running |= {executor.submit(function, task) for task in islice(remaining, free_slots)}
            if not running:
                return
            done, running = wait_for_futures(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()


def run_in_order(
    function: Callable[[TaskT], ResultT], tasks: Iterable[TaskT], *, workers: int
) -> Iterator[ResultT]:
    """Yields the result of every task, in order; tasks are taken from the iterable as needed.

    Arguments and errors are those of `run_tasks`.
    """
    if workers == 1:
        yield from map(function, tasks)
        return
    remaining = iter(tasks)
    with _executor(workers) as executor:
        running: deque[Future[ResultT]] = deque()
        while True:
            free_slots = TASKS_AHEAD * workers - len(running)
            running.extend(
                executor.submit(function, task) for task in islice(remaining, free_slots)
            )
            if not running:
                return
            yield running.popleft().result()


@contextmanager
def _executor(workers: int) -> Iterator[ProcessPoolExecutor]:
    executor = ProcessPoolExecutor(
        max_workers=workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
    )
    try:
        yield executor
    except BrokenProcessPool:
        raise RunError(
            f"one of {workers} worker processes was killed, most often because memory ran out; "
            "run again with fewer workers: finished shards are kept"
        ) from None
    finally:
        executor.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends workers without their tracebacks
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def map_ahead(
    function: Callable[[ValueT], ResultT], values: Iterable[ValueT], *, ahead: int
) -> Iterator[ResultT]:
    """Yields the results in order; at most `ahead` are computed or waiting at any time.

    Args:
        function: function called from threads if `ahead` is above 1.
        values: arguments, taken from the iterable as needed.
        ahead: number of threads; 1 calls the function in this thread.
    """
    if ahead == 1:
        yield from map(function, values)
        return
    remaining = iter(values)
    running: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(ahead) as executor:
        try:
            while True:
                free_slots = ahead - len(running)
                running.extend(
                    executor.submit(function, value) for value in islice(remaining, free_slots)
                )
                if not running:
                    return
                yield running.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)
