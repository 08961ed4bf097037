"""Calls a function for several values at a time, by threads, and yields the results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

ValueT = TypeVar("ValueT")
ResultT = TypeVar("ResultT")


def map_ahead(
    function: Callable[[ValueT], ResultT], values: Iterable[ValueT], *, ahead: int
) -> Iterator[ResultT]:
    """The results in order; at most `ahead` are computed or wait at any time.

    Args:
        function: called from threads when `ahead` is above 1.
        values: taken as they are needed.
        ahead: number of threads; 1 calls the function here.
    """
    if ahead == 1:
        yield from map(function, values)
        return
    remaining = iter(values)
    running: deque[Future[ResultT]] = deque()
    with ThreadPoolExecutor(ahead) as executor:
        try:
            while True:
                free_places = ahead - len(running)
                running.extend(
                    executor.submit(function, value) for value in islice(remaining, free_places)
                )
                if not running:
                    return
                yield running.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)
