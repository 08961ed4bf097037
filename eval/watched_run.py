"""Which checkpoints of a run are evaluated, and which are not yet."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.config_file import InputError
from pretrain.checkpoints.store import StoredCheckpoint, store_of_run


class WatchedRun:
    """A run folder, and the folder of its evaluations.

    Args:
        folder: of the run.
        output: that holds a folder for each step.

    Raises:
        InputError: there is no run.
    """

    def __init__(self, folder: Path, output: Path) -> None:
        if not (folder / "config.yaml").exists():
            raise InputError(
                f"{folder}: expected the folder of a run (key: checkpoint), found no config.yaml; "
                "python -m pretrain.train makes one as it starts"
            )
        self.folder = folder
        self.output = output
        self._passed_over: set[str] = set()

    def output_of(self, step: int) -> Path:
        """Where the results of a step go."""
        return self.output / f"step_{step:08d}"

    def next_checkpoint(self) -> StoredCheckpoint | None:
        """The oldest that is not evaluated; of one step, what the newest attempt saved."""
        newest_of = {each.step: each for each in reversed(self._missing())}
        return newest_of[min(newest_of)] if newest_of else None

    def num_missing(self) -> int:
        """How many steps are not evaluated."""
        return len({each.step for each in self._missing()})

    def _missing(self) -> list[StoredCheckpoint]:
        return [
            each
            for each in store_of_run(str(self.folder)).checkpoints()
            if each.location not in self._passed_over
            and not (self.output_of(each.step) / "results.json").exists()
        ]

    def is_there(self, checkpoint: StoredCheckpoint) -> bool:
        """Whether a checkpoint has not been deleted."""
        return checkpoint in store_of_run(str(self.folder)).checkpoints()

    def pass_over(self, checkpoint: StoredCheckpoint) -> None:
        """Never returns it again."""
        self._passed_over.add(checkpoint.location)

    def is_over(self) -> bool:
        """Whether the run has done all its steps."""
        try:
            return json.loads((self.folder / "status.json").read_text())["state"] == "finished"
        except (OSError, ValueError, KeyError):  # not written yet
            return False
