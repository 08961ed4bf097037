"""Requests to a run while it runs: to save, or to save and stop; by signal, file or clock.

    SIGUSR1, SIGUSR2, SIGTERM    save and stop; a second SIGTERM ends the process at once
    a file STOP in its folder    likewise
    a file SAVE                  save and continue; likewise the clock, every so many minutes
    a newer attempt at the run   stop, without saving

It is enough that one process receives it: all ranks exchange requests at the end of each step, and
act on them there. Files are deleted once their request is acknowledged.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pretrain.distributed.collectives import sum_over_ranks
from pretrain.run import signals
from pretrain.run.signals import STOP_SIGNALS

logger = logging.getLogger(__name__)

SAVE_FILE, STOP_FILE = "SAVE", "STOP"
SECONDS_BETWEEN_LOOKS = 1.0  # at the files, whose folder may be on a slow network
# If several come together, the first of this order is named.
CAUSES = (*(number.name for number in STOP_SIGNALS), f"file {STOP_FILE}")


@dataclass(frozen=True)
class Request:
    """A request, the same on all ranks."""

    is_superseded: bool = False  # a newer attempt at the run has begun
    saves: bool = False
    stop_cause: str | None = None  # name of the signal or file

    @property
    def stops(self) -> bool:
        """Whether the run must end here, with a checkpoint."""
        return self.stop_cause is not None


class RunRequests:
    """Receiver of requests on every rank, inside its `with` block.

    Afterwards the former signal handlers are back. Signals received before, by `signals.listen`,
    count too. Use it in the main thread.

    Args:
        folder: run folder.
        save_every_minutes: minutes between checkpoints; None for no limit.
        looks_at_files: whether this rank looks for files and at the clock; one rank must. It also
            calls `is_superseded`, which may be set later.
        clock: returns seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        save_every_minutes: float | None = None,
        looks_at_files: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.save_every_seconds = None if save_every_minutes is None else 60 * save_every_minutes
        self.looks_at_files = looks_at_files
        self.is_superseded: Callable[[], bool] = lambda: False
        self.clock = clock
        self._last_save = self._last_look = clock()
        self._ignored: set[str] = set()  # files that cannot be deleted
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> RunRequests:
        for number in STOP_SIGNALS:
            self._former[number] = signal.signal(number, signals.record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signals.received.clear()

    def all_reduce(self, *, device: torch.device) -> Request:
        """Exchanges requests among ranks; every rank must call it.

        Args:
            device: device of the exchange.

        Returns:
            The request, the same on every rank.
        """
        asks = [cause in signals.received for cause in CAUSES]
        saves = is_superseded = False
        if self.looks_at_files:
            asks[-1], saves, is_superseded = self._look()
        # A single process takes the same path.
        own = torch.tensor([*asks, saves, is_superseded], dtype=torch.int32, device=device)
        *asked, saves, is_superseded = (count > 0 for count in sum_over_ranks(own).tolist())
        causes = [cause for cause, is_asked in zip(CAUSES, asked, strict=True) if is_asked]
        return Request(is_superseded, saves, causes[0] if causes else None)

    def _look(self) -> tuple[bool, bool, bool]:
        """(whether to stop, whether to save, whether a newer attempt has begun)"""
        now = self.clock()
        is_due = self.save_every_seconds is not None and (
            now - self._last_save >= self.save_every_seconds
        )
        if now - self._last_look < SECONDS_BETWEEN_LOOKS:
            return False, is_due, False
        self._last_look = now
        stops, saves = (
            name not in self._ignored and (self.folder / name).exists()
            for name in (STOP_FILE, SAVE_FILE)
        )
        return stops, saves or is_due, self.is_superseded()

    def acknowledge(self, request: Request) -> None:
        """Deletes the files of a request, and restarts the clock; call it after each checkpoint."""
        self._last_save = self.clock()
        if self.looks_at_files:
            if request.saves:
                self._delete(SAVE_FILE)
            if request.stops:
                self._delete(STOP_FILE)

    def _delete(self, name: str) -> None:
        path = self.folder / name
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            self._ignored.add(name)
            logger.warning(
                "%s: expected a file that can be deleted, found: %s; this attempt ignores it from "
                "now on, and the next one acts on it unless it is gone by then: delete it",
                path,
                error.strerror,
            )
