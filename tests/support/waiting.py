"""Waiting for what other threads and processes do."""

import time
from collections.abc import Callable
from typing import Any

LIMIT_SECONDS = 600  # only ends what hangs


def wait_until(is_so: Callable[[], Any]) -> None:
    """Waits until a condition holds.

    Raises:
        AssertionError: if it does not hold in LIMIT_SECONDS.
    """
    deadline = time.monotonic() + LIMIT_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"{LIMIT_SECONDS} s have passed"
        time.sleep(0.01)
