"""Checks, without torch, what every command of this package is given: a checkpoint, an output."""

from __future__ import annotations

from pathlib import Path

from data_prep.config_file import InputError, check_output_folder


def check_checkpoint_and_output(checkpoint: Path, output: Path) -> None:
    """
    Raises:
        InputError: there is no checkpoint, or the output folder cannot be written.
    """
    check_output_folder(output, key="output")
    if any(checkpoint.glob("checkpoints/step_*")) or (checkpoint / "checkpoint.json").exists():
        return
    raise InputError(
        f"{checkpoint}: expected a run folder with a checkpoint, or a checkpoint (key: "
        "checkpoint), found neither; python -m pretrain.train makes one"
    )
