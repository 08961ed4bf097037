"""Notices a step that does not end: writes down where all threads are, and ends the process.

    stacks/<attempt>/rank_00003.txt

Ranks that wait for one that hangs are freed by the process group's time-out, a while after their
stacks were written. A rank that hangs elsewhere ends itself, so that none stays for ever. The clock
runs from the last sign of life; the last resort is a timer of faulthandler's, which needs no
Python and so works where the interpreter itself is stuck. The file also takes what faulthandler
tells of a process that dies of a fault. One with its first line alone is of a process that died
without a word: it was killed, or its machine was lost.
"""

from __future__ import annotations

import faulthandler
import logging
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from pretrain.config import END_SHARE
from pretrain.distributed.collectives import rank
from pretrain.run.attempts import machine_name
from pretrain.run.end_causes import STACKS

logger = logging.getLogger(__name__)

DUMP_SHARE = 0.8  # of the time-out, after which stacks are written


class HangWatch:
    """Watches from `with` on; every rank has its own.

    Args:
        folder: of the run.
        attempt: id of this attempt.
        timeout_seconds: of the process group's collectives, in a step.
        start_timeout_seconds: before the first step's end.
    """

    def __init__(
        self, folder: Path, attempt: str, *, timeout_seconds: float, start_timeout_seconds: float
    ) -> None:
        self.path = folder / STACKS / attempt / f"rank_{rank():05d}.txt"
        self._timeouts = {False: timeout_seconds, True: start_timeout_seconds}
        self._timeout = start_timeout_seconds
        self.has_written = False
        self._last_sign = time.monotonic()
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
        """Name in the config of the time-out that holds now."""
        is_slow = self._timeout == self._timeouts[True]
        return "engine.start_timeout_seconds" if is_slow else "engine.timeout_seconds"

    def heartbeat(self, *, is_slow: bool = False) -> None:
        """To be called when a step, or anything as long, has ended.

        Args:
            is_slow: whether what comes next may take as long as a start.
        """
        self._last_sign = time.monotonic()  # first: the thread is not to hold it against the other
        self._timeout = self._timeouts[is_slow]
        faulthandler.dump_traceback_later(END_SHARE * self._timeout, file=self._file, exit=True)

    def _watch(self) -> None:
        longest = DUMP_SHARE * min(self._timeouts.values())  # the limit may be another by then
        told, pause = None, longest
        while not self._is_over.wait(pause):
            limit, last_sign = DUMP_SHARE * self._timeout, self._last_sign
            silent = time.monotonic() - last_sign
            if silent >= limit and last_sign != told:
                self._write(silent)
                told = last_sign
            pause = min(limit - silent if silent < limit else limit / 8, longest)

    def _write(self, silent_seconds: float) -> None:
        self.has_written = True
        self._file.write(f"no step ended for {silent_seconds:.0f} s\n\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        logger.error(
            "rank %d: no step ended for %.0f s: %s says where this rank is; the run ends %.0f s "
            "after the last step (%s=%g)",
            rank(),
            silent_seconds,
            self.path,
            END_SHARE * self._timeout,
            self.timeout_key,
            self._timeout,
        )
