"""Hears the signals that ask a process to stop, from its first moment on.

Imports take seconds, and a signal that comes meanwhile would end the process: a job that is
preempted as it starts would fail, and not be queued again. So an entry point listens before its
other imports, and whoever can heed what was heard takes over.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
heard: set[str] = set()  # names


def listen() -> None:
    """From now on signals are written down; a second SIGTERM ends the process at once."""
    for number in STOP_SIGNALS:
        signal.signal(number, hear)


def ignore() -> None:
    """Signals that only ask to stop do not kill a process that ends anyway; as it takes itself
    down, Python gives up its handlers."""
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def hear(number: int, frame: FrameType | None) -> None:
    """The handler."""
    name = signal.Signals(number).name
    if name == "SIGTERM" and name in heard:
        os._exit(128 + number)
    heard.add(name)
