"""Forks: runs that start from the state of another run, by run.fork or run.parent.

    config of the parent + changes --> new run folder, whose name is a function of both
    a checkpoint of the parent     --> first checkpoint of the fork: at the same step, with the
                                       parent's optimizer state; or, with run.fork.schedule=restart,
                                       at step 0, with its weights alone

The parent is only read. The origin of a fork is in its parent.json, in the record of each of its
checkpoints, and in its tags: its result is not a function of its config alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

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
from pretrain.config import Fork, PretrainConfig, Run
from pretrain.run.checkpoint_identity import FINGERPRINTS_IN_RECORD
from pretrain.run.compatibility import RunIdentity, holds_run
from pretrain.settings.optimizer import Unfreeze
from pretrain.stored_config import read_config_of_run

logger = logging.getLogger(__name__)

PARENT_FILE = "parent.json"
SCHEDULE_KEY = "schedule"  # missing in files of earlier versions, which always continued
PARENT_TYPES = {
    "folder": str,
    "checkpoint": str,
    "step": int,
    "model_sha256": str,
    "marks": list[str],
    "differs_in": dict,
    SCHEDULE_KEY: str,
}
FORK_TAG = "forked"


def config_of_fork(config: PretrainConfig) -> PretrainConfig:
    """Returns the config of the run that `run.fork` creates; without it, the config itself.

    Running the same command again resumes the same fork.
    """
    if not config.run.fork or config.run.parent is not None:
        return config
    parent = config.run.folder
    values = fixed_values(config)
    has_defaults = config.run.start == Fork()
    if not has_defaults:
        values["run"] = {"fork": config.run.start.model_dump()}
    text = json.dumps(values, sort_keys=True)
    suffix = f"_fork_{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    base = config.run.checkpoint_folder
    changes = {
        "fork": False if has_defaults else config.run.fork,
        "parent": parent,
        "folder": parent.with_name(parent.name + suffix),
        "checkpoint_folder": None if base is None else base.rstrip("/") + suffix,
    }
    return config.model_copy(update={"run": config.run.model_copy(update=changes)})


def check_parent(identity: RunIdentity) -> None:
    """Checks the parent of a run that is about to be created.

    Raises:
        InputError: if the parent is the same run, or as `check_start`.
    """
    run = identity.config.run
    is_new_fork = run.parent is not None and not holds_run(run.folder)
    continues = is_new_fork and run.start.schedule == "continue"
    if continues and holds_run(run.parent) and not _differences_to_parent(identity):
        raise InputError(
            f"{run.parent} holds this same run: a fork of it would compute the same result; "
            "remove run.fork and run.parent to resume it"
        )
    check_start(identity.config)


def check_start(config: PretrainConfig) -> None:
    """Checks that a fork can start as run.fork says.

    Raises:
        InputError: if there is no run in the parent's folder, or it has no valid checkpoint to
            start from. Also if it leaves no step to train, has another optimizer, or opened other
            parameters. Also if the fork exists and was created with another run.fork.
    """
    run = config.run
    if run.parent is None:
        return
    if holds_run(run.folder):
        _refuse_other_start(run)
        return
    if not holds_run(run.parent):
        raise InputError(
            f"{run.parent}: expected the run to start from (run.fork, run.parent), found no "
            "config.yaml there; use the folder of a run, or remove these keys"
        )
    _refuse_other_optimizer(config)
    for checkpoint in store_of_run(str(run.parent)).checkpoints():
        if run.start.step in (None, checkpoint.step):
            with suppress(DamagedCheckpointError):  # it is skipped when the fork begins, too
                step = read_record(checkpoint.location).state.step
                refuse_finished_parent(config, step=step)
                refuse_other_openings(config, step=step)
                return
    refuse_missing_start(run)


def _refuse_other_optimizer(config: PretrainConfig) -> None:
    name, parent = config.optimizer.name, read_config_of_run(config.run.parent).optimizer.name
    if config.run.start.schedule == "continue" and name != parent:
        raise InputError(
            f"optimizer.name={name}: the run would continue with the moments of {parent}, the "
            f"optimizer of {config.run.parent} (run.fork, run.parent); keep optimizer.name="
            f"{parent}, or set run.fork.schedule=restart to begin with its weights alone"
        )


def _refuse_other_start(run: Run) -> None:
    stored = read_config_of_run(run.folder).run
    if stored.parent is not None and stored.start != run.start:
        raise InputError(
            f"{run.folder} holds a fork that was created with {_describe(stored.start)}, found "
            f"{_describe(run.start)}; resume it with its own run.fork, set run.folder to a new "
            "folder, or set run.parent=null to fork this fork"
        )


def _describe(start: Fork) -> str:
    step = "null" if start.step is None else start.step
    return f"run.fork.step={step} and run.fork.schedule={start.schedule}"


def refuse_missing_start(run: Run) -> NoReturn:
    """Refuses a fork whose parent has no valid checkpoint to start from.

    Raises:
        InputError: always; if run.fork.step is set, the message lists the steps that exist.
    """
    if run.start.step is None:
        raise InputError(
            f"{run.parent}: expected a run with a valid checkpoint to start from (run.fork, "
            "run.parent), found none; train the parent until it saves one"
        )
    steps = sorted({each.step for each in store_of_run(str(run.parent)).checkpoints()})
    others = ", ".join(str(step) for step in steps if step != run.start.step)
    found = "a damaged one" if run.start.step in steps else "none"
    raise InputError(
        f"run.fork.step={run.start.step}: expected a valid checkpoint of {run.parent} at this "
        f"step, found {found}; {f'use one of the steps {others}' if others else 'it has no other'}"
    )


def refuse_finished_parent(config: PretrainConfig, *, step: int) -> None:
    """Refuses a fork that would begin at or after its last step, and train nothing.

    Args:
        config: config of the fork.
        step: steps done at the parent's checkpoint that the fork begins from.

    Raises:
        InputError: if there is no step left.
    """
    if config.run.start.schedule == "continue" and step >= config.schedule.num_steps:
        raise InputError(
            f"schedule.num_steps={config.schedule.num_steps} leaves nothing to train: the fork "
            f"begins at step {step} of {config.run.parent} (run.fork, run.parent) and continues "
            f"its count; set schedule.num_steps above {step}, or run.fork.schedule=restart to "
            "begin at step 0 with the parent's weights"
        )


def refuse_other_openings(config: PretrainConfig, *, step: int) -> None:
    """Refuses a fork that continues after its parent has opened other parameters than its own.

    The number of updates of a parameter follows from the step that opened it.

    Args:
        config: config of the fork.
        step: steps done at the parent's checkpoint that the fork begins from.

    Raises:
        InputError: if entries of `unfreeze` before that step differ from the parent's.
    """
    if config.run.start.schedule == "restart":
        return
    parent = read_config_of_run(config.run.parent)
    ours, theirs = (
        [each for each in one.optimizer.unfreeze if each.from_step < step]
        for one in (config, parent)
    )
    if ours != theirs:
        raise InputError(
            f"optimizer.unfreeze: before step {step}, at which the fork begins, expected the "
            f"entries of {config.run.parent} ({_describe_entries(theirs)}), found "
            f"{_describe_entries(ours)}; keep them and add later ones, or set "
            "run.fork.schedule=restart"
        )


def _describe_entries(entries: Sequence[Unfreeze]) -> str:
    described = [f"{{from_step: {each.from_step}, ...}}" for each in entries]
    return ", ".join(described) or "none"


def first_step_of_fork(parent: Mapping[str, Any]) -> int:
    """Returns the steps done when a fork was created, from the content of its parent.json."""
    return 0 if parent.get(SCHEDULE_KEY) == "restart" else parent["step"]


def record_parent(identity: RunIdentity, checkpoint: VerifiedCheckpoint) -> None:
    """Records the checkpoint that a run starts from; for the main process."""
    run = identity.config.run
    values = {
        "folder": str(run.parent.resolve()),
        "checkpoint": checkpoint.location,
        "step": checkpoint.record.state.step,
        SCHEDULE_KEY: run.start.schedule,
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


def origin_of_checkpoints(
    folder: Path, *, strategy: str, fingerprints: Mapping[str, str]
) -> dict[str, Any]:
    """Returns the origin that the record of every checkpoint stores.

    If the run is a fork, it includes the content of parent.json.

    Args:
        folder: run folder.
        strategy: strategy of the engine.
        fingerprints: fingerprints of everything that the run reads.
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
    origin = {"strategy": strategy, FINGERPRINTS_IN_RECORD: dict(fingerprints)}
    return origin | ({} if parent is None else {"parent": parent})


def parse_parent(content: bytes) -> dict[str, Any]:
    """Parses the content of parent.json.

    Raises:
        DamagedFileError: if it is damaged.
    """
    values, _ = read_sealed_json(content, unsealed_keys=PARENT_TYPES)
    check_types(values, PARENT_TYPES, optional=(SCHEDULE_KEY,))
    return values


def _parent_in_checkpoints(folder: Path) -> dict[str, Any] | None:
    for each in store_of_run(str(folder)).checkpoints():
        try:
            return read_record(each.location).written_by.get("parent")
        except DamagedCheckpointError:
            continue  # named when the run resumed
    return None
