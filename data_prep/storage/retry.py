"""Retry policy of all I/O: file transfers, remote files, web downloads and shard reads.

A call is retried on transient errors, with exponentially growing delays. The caller decides which
errors are transient, because this depends on the library that raises them.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


def pause(seconds: float) -> None:
    """Waits between two attempts; tests replace this function to avoid waiting."""
    time.sleep(seconds)


def uniform() -> float:
    """Draws from [0, 1) for the jitter, independently of the random numbers of any computation."""
    return random.SystemRandom().random()


@dataclass(frozen=True)
class RetryPolicy:
    """Bounded retries with exponential backoff and jitter.

    The delay before retry n (from 0) is min(first_delay_seconds * factor**n, max_delay_seconds),
    times a random factor from [min_jitter, 1]. The jitter prevents the processes of a cluster from
    repeating their requests at the same time.
    """

    retries: int  # number of attempts after the first
    first_delay_seconds: float = 0.5
    factor: float = 2.0
    max_delay_seconds: float = 30.0
    min_jitter: float = 0.5  # 1: no jitter

    @property
    def num_attempts(self) -> int:
        """Number of attempts, including the first."""
        return self.retries + 1

    def delay_seconds(self, retry: int, *, draw: float) -> float:
        """Computes the delay before a retry.

        Args:
            retry: number of the retry, from 0.
            draw: random number in [0, 1).
        """
        delay = min(self.first_delay_seconds * self.factor**retry, self.max_delay_seconds)
        return delay * (self.min_jitter + (1 - self.min_jitter) * draw)

    def call(
        self,
        action: Callable[[], Result],
        *,
        is_transient: Callable[[Exception], bool],
        on_retry: Callable[[Exception, float], None] | None = None,
        wait: Callable[[Exception, float], None] | None = None,
    ) -> Result:
        """Calls a function until it succeeds, fails permanently, or no attempt remains.

        Args:
            action: function without arguments that is safe to repeat.
            is_transient: returns True for errors that may not recur on a retry.
            on_retry: called before each retry with the error and the delay in seconds, for logging.
            wait: waits for the delay after an error; the default is `pause`.

        Returns:
            The result of the first successful attempt.

        Raises:
            Exception: the error of the last attempt.
        """
        for retry in range(self.retries):
            try:
                return action()
            except Exception as error:
                if not is_transient(error):
                    raise
                delay = self.delay_seconds(retry, draw=uniform())
                if on_retry is not None:
                    on_retry(error, delay)
                pause(delay) if wait is None else wait(error, delay)
        return action()
