"""Fail points: named points of a run at which tests can interrupt it.

    start        before the process group is joined
    loaded       before the first step
    step         before each step
    update       before the optimizer applies a gradient
    validation   before the loss of each validation batch
    writing      while a file of a checkpoint is partly written
    commit       a checkpoint is complete but not committed
    committed    a checkpoint is committed

A fail point is a Python audit event. It does nothing unless a hook is installed with
`sys.addaudithook`, which only tests do.
"""

from __future__ import annotations

import sys

EVENT = "isopair.fail_point"


def fail_point(name: str) -> None:
    """Raises the audit event `EVENT` with the name of the fail point as its only argument."""
    sys.audit(EVENT, name)
