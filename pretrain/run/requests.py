"""Requests to a running run to save or to stop, by signal, file or clock.

    SIGUSR1, SIGUSR2, SIGTERM            save and stop; a second SIGTERM ends the process at once
    file STOP in the run folder          save and stop
    file SAVE in the run folder          save and continue
    run.checkpoint_every_minutes passed  save and continue
    a newer attempt at the run           stop without saving

One process that receives a request suffices: all ranks exchange requests at the end of each step
and act on them there. Files are deleted once their request is acknowledged.
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
SECONDS_BETWEEN_POLLS = 1.0  # the files' folder may be on a slow network
# If several arrive together, the first in this order is reported.
CAUSES = (*(number.name for number in STOP_SIGNALS), f"file {STOP_FILE}")


@dataclass(frozen=True)
class Request:
    """A combined request, equal on all ranks."""

    is_superseded: bool = False  # a newer attempt at the run has begun
    saves: bool = False
    stop_cause: str | None = None  # name of the signal or file

    @property
    def stops(self) -> bool:
        """Whether the run must save a checkpoint and end."""
        return self.stop_cause is not None


class RunRequests:
    """Receives requests on every rank, inside its `with` block.

    Signals that `signals.listen` recorded earlier count too. The previous signal handlers are
    restored at the end of the block. Use it in the main thread.

    Args:
        folder: run folder.
        save_every_minutes: minutes between checkpoints; None for no limit.
        polls_files: whether this rank checks files, the clock and `is_superseded`, which may be set
            later; exactly one rank must.
        clock: returns seconds.
    """

    def __init__(
        self,
        folder: Path,
        *,
        save_every_minutes: float | None = None,
        polls_files: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder = folder
        self.save_every_seconds = None if save_every_minutes is None else 60 * save_every_minutes
        self.polls_files = polls_files
        self.is_superseded: Callable[[], bool] = lambda: False
        self.clock = clock
        self._last_save = self._last_poll = clock()
        self._ignored: set[str] = set()  # files that cannot be deleted
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> RunRequests:
        for number in STOP_SIGNALS:
            self._previous_handlers[number] = signal.signal(number, signals.record)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signals.received.clear()

    def all_reduce(self, *, device: torch.device) -> Request:
        """Exchanges requests among ranks; every rank must call it.

        Args:
            device: device of the exchange.

        Returns:
            The combined request, equal on every rank.
        """
        stops = [cause in signals.received for cause in CAUSES]
        saves = is_superseded = False
        if self.polls_files:
            stops[-1], saves, is_superseded = self._poll()
        own = torch.tensor([*stops, saves, is_superseded], dtype=torch.int32, device=device)
        *stops, saves, is_superseded = (count > 0 for count in sum_over_ranks(own).tolist())
        causes = [cause for cause, is_received in zip(CAUSES, stops, strict=True) if is_received]
        return Request(is_superseded, saves, causes[0] if causes else None)

    def _poll(self) -> tuple[bool, bool, bool]:
        """(whether to stop, whether to save, whether a newer attempt has begun)"""
        now = self.clock()
        is_due = self.save_every_seconds is not None and (
            now - self._last_save >= self.save_every_seconds
        )
        if now - self._last_poll < SECONDS_BETWEEN_POLLS:
            return False, is_due, False
        self._last_poll = now
        stops, saves = (
            name not in self._ignored and (self.folder / name).exists()
            for name in (STOP_FILE, SAVE_FILE)
        )
        return stops, saves or is_due, self.is_superseded()

    def acknowledge(self, request: Request) -> None:
        """Deletes the files of a request and restarts the clock; call it after each checkpoint."""
        self._last_save = self.clock()
        if self.polls_files:
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
