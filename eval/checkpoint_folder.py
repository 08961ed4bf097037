"""Checks, without torch, what every command of this package is given: a checkpoint, an output."""

from __future__ import annotations

from pathlib import Path

from data_prep.config_file import InputError, check_output_folder
from pretrain.checkpoint_store import find_locations


def check_checkpoint_and_output(checkpoint: Path, output: Path) -> None:
    """
    Raises:
        InputError: there is no checkpoint, or the output folder cannot be written.
    """
    check_output_folder(output, key="output")
    if find_locations(str(checkpoint)):
        return
    raise InputError(
        f"{checkpoint}: expected a run folder with a checkpoint, or a checkpoint (key: "
        "checkpoint), found neither; python -m pretrain.train makes one"
    )
