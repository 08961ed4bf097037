"""Named moments of a run, for tests that stop it there.

    start  loaded            before the processes meet; before the first step
    step  update             before each step; before the optimizer applies the gradient
    validation               before each batch's loss in a validation
    writing                  a file of a checkpoint is written in part
    commit  committed        a checkpoint is whole but not committed; it is committed

A moment is an audit event of Python's: it does nothing unless a hook is installed with
`sys.addaudithook`, which only tests do.
"""

from __future__ import annotations

import sys

EVENT = "isopair.moment"


def moment(name: str) -> None:
    """Raises an audit event named `EVENT` with the moment's name as its only argument."""
    sys.audit(EVENT, name)
