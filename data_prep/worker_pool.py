"""Runs one task per shard, here or in worker processes, and yields the results as they come.

Processes are started afresh (never forked), and end when the one that started them is killed, so
that no orphan writes into a folder that another attempt has taken over.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import TypeVar

from data_prep.config_file import RunError

TaskT = TypeVar("TaskT")
ResultT = TypeVar("ResultT")


def run_tasks(
    function: Callable[[TaskT], ResultT], tasks: Sequence[TaskT], *, workers: int
) -> Iterator[ResultT]:
    """The result of every task, in any order.

    Args:
        function: defined at the top of a module, so that another process can import it.
        tasks: what it is called with.
        workers: number of processes; 1 runs everything in this one.

    Raises:
        RunError: a worker process was killed, most often for want of memory.
    """
    if workers == 1 or len(tasks) < 2:
        yield from map(function, tasks)
        return
    executor = ProcessPoolExecutor(
        max_workers=min(workers, len(tasks)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_prepare_worker,
    )
    try:
        for future in as_completed([executor.submit(function, task) for task in tasks]):
            yield future.result()
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
