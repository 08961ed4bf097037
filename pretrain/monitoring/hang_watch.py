"""Watchdog for hanging steps: writes the stacks of all threads and ends the process.

    stacks/<attempt>/rank_00003.txt

Ranks that wait for a hanging one fail with the time-out of the process group, some time after
their stacks were written. A rank that hangs outside a collective is ended by its watchdog, so that
no process is left running. The clock restarts at every heartbeat.

The process is ended by a timer of faulthandler, which works even if the interpreter is stuck.
faulthandler also writes the stacks of a crashing process to the file. A file with only its first
line belongs to a process that exited without a traceback: it was killed, or its machine was lost.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pretrain.config import END_FRACTION
from pretrain.distributed.collectives import rank
from pretrain.run.attempts import machine_name
from pretrain.run.end_causes import STACKS

logger = logging.getLogger(__name__)

DUMP_FRACTION = 0.8  # fraction of the time-out after which stacks are written


class HangWatch:
    """Watchdog of one rank, active inside its `with` block.

    Args:
        folder: run folder.
        attempt: number of this attempt.
        timeout_seconds: time-out of collectives in a step.
        start_timeout_seconds: time-out until the end of the first step.
        clock: returns seconds.
    """

    def __init__(
        self,
        folder: Path,
        attempt: str,
        *,
        timeout_seconds: float,
        start_timeout_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.path = folder / STACKS / attempt / f"rank_{rank():05d}.txt"
        self._timeouts = {False: timeout_seconds, True: start_timeout_seconds}
        self._timeout = start_timeout_seconds
        self.has_written = False
        self._clock = clock
        self._last_heartbeat = clock()
        self._reported_heartbeat: float | None = None  # its silence was reported
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def __enter__(self) -> HangWatch:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        self._file.write(f"rank {rank()} on {machine_name()}\n")
        self._file.flush()
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(self._file)
        self.heartbeat(is_slow=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._is_over.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        faulthandler.disable()
        if self._was_enabled:
            faulthandler.enable(sys.__stderr__)
        self._file.close()
        if not self.has_written:
            self.path.unlink(missing_ok=True)

    @property
    def timeout_key(self) -> str:
        """Config key of the current time-out."""
        is_slow = self._timeout == self._timeouts[True]
        return "engine.start_timeout_seconds" if is_slow else "engine.timeout_seconds"

    def heartbeat(self, *, is_slow: bool = False) -> None:
        """Restarts the clock; call it at the end of each step or similarly long work.

        Args:
            is_slow: whether the next work may take as long as a start-up.
        """
        # Before the time-out: `check` must not compare an old heartbeat with a new limit.
        self._last_heartbeat = self._clock()
        self._timeout = self._timeouts[is_slow]
        faulthandler.dump_traceback_later(END_FRACTION * self._timeout, file=self._file, exit=True)

    def _watch(self) -> None:
        pause = DUMP_FRACTION * min(self._timeouts.values())
        while not self._is_over.wait(pause):
            pause = self.check()

    def check(self) -> float:
        """Writes the stacks, once per silence, if the last heartbeat is too long ago.

        Returns:
            Seconds until the next check.
        """
        # The limit may change before the next check.
        longest = DUMP_FRACTION * min(self._timeouts.values())
        limit, last_heartbeat = DUMP_FRACTION * self._timeout, self._last_heartbeat
        silent = self._clock() - last_heartbeat
        if silent >= limit and last_heartbeat != self._reported_heartbeat:
            self._write(silent)
            self._reported_heartbeat = last_heartbeat
        return min(limit - silent if silent < limit else limit / 8, longest)

    def _write(self, silent_seconds: float) -> None:
        self.has_written = True
        self._file.write(f"no step ended for {silent_seconds:.0f} s\n\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        logger.error(
            "rank %d: no step ended for %.0f s: %s shows where this rank is; the run ends %.0f s "
            "after the last step (%s=%g)",
            rank(),
            silent_seconds,
            self.path,
            END_FRACTION * self._timeout,
            self.timeout_key,
            self._timeout,
        )
