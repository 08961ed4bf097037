"""Forks: runs that start from the state of another run, by run.fork or run.parent.

    config of the parent + changes --> new run folder, whose name is a function of both
    newest checkpoint of the parent --> first checkpoint of the fork; its step count continues

The parent is only read. The origin of a fork is in its parent.json, in the record of each of its
checkpoints, and in its tags: its result is not a function of its config alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from data_prep.config_file import fixed_values
from data_prep.errors import InputError
from data_prep.storage.atomic import write_atomically
from data_prep.storage.sealed import (
    DamagedFileError,
    check_types,
    read_sealed_json,
    to_sealed_json,
    warn_once,
)
from pretrain.checkpoint import VerifiedCheckpoint
from pretrain.checkpoints.record import read_record
from pretrain.checkpoints.store import DamagedCheckpointError, store_of_run
from pretrain.config import PretrainConfig
from pretrain.run.compatibility import RunIdentity, holds_run

logger = logging.getLogger(__name__)

PARENT_FILE = "parent.json"
PARENT_TYPES = {
    "folder": str,
    "checkpoint": str,
    "step": int,
    "model_sha256": str,
    "marks": list[str],
    "differs_in": dict,
}
FORK_TAG = "forked"


def config_of_fork(config: PretrainConfig) -> PretrainConfig:
    """Returns the config of the run that `run.fork` creates; without it, the config itself.

    Running the same command again resumes the same fork.
    """
    if not config.run.fork:
        return config
    parent = config.run.folder
    values = json.dumps(fixed_values(config), sort_keys=True)
    suffix = f"_fork_{hashlib.sha256(values.encode()).hexdigest()[:8]}"
    base = config.run.checkpoint_folder
    changes = {
        "fork": False,
        "parent": parent,
        "folder": parent.with_name(parent.name + suffix),
        "checkpoint_folder": None if base is None else base.rstrip("/") + suffix,
    }
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


def check_parent(identity: RunIdentity) -> None:
    """Checks the parent of a run that is about to be created.

    Raises:
        InputError: if there is no run in the parent's folder, it is the same run, or its newest
            checkpoint leaves no step to train.
    """
    run = identity.config.run
    if run.parent is None or holds_run(run.folder):
        return
    if not holds_run(run.parent):
        raise InputError(
            f"{run.parent}: expected the run to start from (run.fork, run.parent), found no "
            "config.yaml there; use the folder of a run, or remove these keys"
        )
    if not _differences_to_parent(identity):
        raise InputError(
            f"{run.parent} holds this same run: a fork of it would compute the same result; "
            "remove run.fork and run.parent to resume it"
        )
    for checkpoint in store_of_run(str(run.parent)).checkpoints():
        try:
            step = read_record(checkpoint.location).state.step
        except DamagedCheckpointError:
            continue  # it is skipped when the fork begins, too
        refuse_finished_parent(identity.config, step=step)
        return


def refuse_finished_parent(config: PretrainConfig, *, step: int) -> None:
    """Refuses a fork that would begin at or after its last step, and train nothing.

    Args:
        config: config of the fork.
        step: steps done at the parent's checkpoint that the fork begins from.

    Raises:
        InputError: if there is no step left.
    """
    if step >= config.schedule.num_steps:
        raise InputError(
            f"schedule.num_steps={config.schedule.num_steps} leaves nothing to train: the fork "
            f"begins at step {step} of {config.run.parent} (run.fork, run.parent) and continues "
            f"its count; set schedule.num_steps above {step}"
        )


def record_parent(identity: RunIdentity, checkpoint: VerifiedCheckpoint) -> None:
    """Records the checkpoint that a run starts from; for the main process."""
    run = identity.config.run
    values = {
        "folder": str(run.parent.resolve()),
        "checkpoint": checkpoint.location,
        "step": checkpoint.record.state.step,
        "model_sha256": checkpoint.record.model_sha256,
        "marks": list(checkpoint.record.state.tags),
        "differs_in": {
            key: {"parent": in_parent, "fork": in_fork}
            for key, (in_parent, in_fork) in _differences_to_parent(identity).items()
        },
    }
    write_atomically(run.folder / PARENT_FILE, to_sealed_json(values, indent=2))


def _differences_to_parent(identity: RunIdentity) -> dict[str, tuple[Any, Any]]:
    parent = identity.config.run.parent
    return identity.differences_to(parent, store=store_of_run(str(parent)))


def origin_of_checkpoints(folder: Path, *, strategy: str) -> dict[str, Any]:
    """Returns the origin that the record of every checkpoint stores.

    It consists of the engine's strategy and, if the run is a fork, the content of parent.json.

    Args:
        folder: run folder.
        strategy: strategy of the engine.
    """
    path = folder / PARENT_FILE
    parent = None
    if path.exists():
        try:
            parent = parse_parent(path.read_bytes())
        except DamagedFileError as error:
            parent = _parent_in_checkpoints(folder)
            found = "none" if parent is None else "it is"
            warn_once(
                logger,
                f"{path}: damaged: {error}; {found} taken from the record of a checkpoint",
            )
    return {"strategy": strategy} | ({} if parent is None else {"parent": parent})


def parse_parent(content: bytes) -> dict[str, Any]:
    """Parses the content of parent.json.

    Raises:
        DamagedFileError: if it is damaged.
    """
    values, _ = read_sealed_json(content, unsealed_keys=PARENT_TYPES)
    check_types(values, PARENT_TYPES)
    return values


def _parent_in_checkpoints(folder: Path) -> dict[str, Any] | None:
    for each in store_of_run(str(folder)).checkpoints():
        try:
            return read_record(each.location).written_by.get("parent")
        except DamagedCheckpointError:
            continue  # named when the run resumed
    return None
