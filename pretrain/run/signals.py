"""Installs signal handlers before the slow imports.

Imports take seconds. A signal during them would end the process, so that a job preempted at its
start would fail instead of being requeued. So a command calls `listen` before its other imports;
`pretrain.run.requests` acts on the received signals.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
received: set[str] = set()  # names of signals


def listen() -> None:
    """Records signals from now on; a second SIGTERM ends the process at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, record)


def ignore() -> None:
    """Ignores SIGUSR1 and SIGUSR2, so that they do not kill a process during its shutdown.

    Python removes its handlers while the interpreter shuts down.
    """
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def record(number: int, frame: FrameType | None) -> None:
    """Handles a signal: records it, or exits at the second SIGTERM."""
    name = signal.Signals(number).name
    if name == "SIGTERM" and name in received:
        os._exit(128 + number)
    received.add(name)
