"""Notices a step that does not end: writes down where all threads are, and ends the process.

    stacks/<attempt>/rank_00003.txt

Ranks that wait for one that hangs are freed by the process group's time-out, a while after their
stacks were written. A rank that hangs elsewhere ends itself, so that none stays for ever. The clock
runs from the end of the last step; the last resort is a timer of faulthandler's, which needs no
Python and so works where the interpreter itself is stuck.
"""

from __future__ import annotations

import faulthandler
import logging
import threading
import time
from pathlib import Path
from types import TracebackType

from pretrain.config import END_SHARE
from pretrain.gather import rank

logger = logging.getLogger(__name__)

FOLDER = "stacks"
DUMP_SHARE = 0.8  # of the time-out, after which stacks are written


class HangWatch:
    """Watches from `with` on; every rank has its own.

    Args:
        folder: of the run.
        attempt: id of this attempt.
        timeout_seconds: of the process group's collectives.
    """

    def __init__(self, folder: Path, attempt: str, *, timeout_seconds: float) -> None:
        self.path = folder / FOLDER / attempt / f"rank_{rank():05d}.txt"
        self.timeout_seconds = timeout_seconds
        self.has_written = False
        self._last_sign = time.monotonic()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)

    def __enter__(self) -> HangWatch:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        self.sign_of_life()
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
        self._file.close()
        if not self.has_written:
            self.path.unlink(missing_ok=True)

    def sign_of_life(self) -> None:
        """To be called when a step, or anything as long, has ended."""
        self._last_sign = time.monotonic()
        faulthandler.dump_traceback_later(
            END_SHARE * self.timeout_seconds, file=self._file, exit=True
        )

    def _watch(self) -> None:
        limit = DUMP_SHARE * self.timeout_seconds
        told, pause = None, limit
        while not self._is_over.wait(pause):
            last_sign = self._last_sign
            silent = time.monotonic() - last_sign
            if silent >= limit and last_sign != told:
                self._write(silent)
                told = last_sign
            pause = limit - silent if silent < limit else limit / 8

    def _write(self, silent_seconds: float) -> None:
        self.has_written = True
        self._file.write(f"no step ended for {silent_seconds:.0f} s\n\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        logger.error(
            "rank %d: no step ended for %.0f s: %s says where this rank is; the run ends %.0f s "
            "after the last step (engine.timeout_seconds=%g)",
            rank(),
            silent_seconds,
            self.path,
            END_SHARE * self.timeout_seconds,
            self.timeout_seconds,
        )
