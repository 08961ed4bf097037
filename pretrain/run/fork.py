"""Runs that begin from another run's state: forks, by run.fork or run.parent.

    config of the parent + changes --> a folder of its own, whose name is a function of both
    newest checkpoint of the parent --> first checkpoint of the fork; steps are counted on

The parent is read, never written to. What a fork came from is in its parent.json, in the record of
each of its checkpoints, and in its tags: its result is not a function of its config alone.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from data_prep.config_file import fixed_values
from data_prep.errors import InputError
from data_prep.storage.atomic import write_atomically
from pretrain.checkpoint import WholeCheckpoint
from pretrain.checkpoints.store import store_of_run
from pretrain.config import PretrainConfig
from pretrain.run.compatibility import differences_to_run, fingerprints_of_run, holds_run

PARENT_FILE = "parent.json"
FORK_TAG = "forked"


def config_of_fork(config: PretrainConfig) -> PretrainConfig:
    """The config of the run that `run.fork` asks for; the config itself where it does not.

    The same command finds the same fork again, and goes on with it.
    """
    if not config.run.fork:
        return config
    parent = config.run.folder
    values = json.dumps(fixed_values(config), sort_keys=True)
    suffix = f"_fork_{hashlib.sha256(values.encode()).hexdigest()[:8]}"
    elsewhere = config.run.checkpoint_folder
    place = {
        "fork": False,
        "parent": parent,
        "folder": parent.with_name(parent.name + suffix),
        "checkpoint_folder": None if elsewhere is None else elsewhere.rstrip("/") + suffix,
    }
    return config.model_copy(update={"run": config.run.model_copy(update=place)})


def check_parent(config: PretrainConfig, *, fingerprints: dict[str, str]) -> None:
    """
    Raises:
        InputError: the run that a new one is to begin from is not there, or is the same run.
    """
    parent, folder = config.run.parent, config.run.folder
    if parent is None or holds_run(folder):
        return
    if not holds_run(parent):
        raise InputError(
            f"{parent}: expected the run to begin from (run.fork, run.parent), found no "
            "config.yaml there; name the folder of a run, or leave these keys out"
        )
    if not _differences(config, fingerprints):
        raise InputError(
            f"{parent} holds this very run: a fork of it would come to the same result; leave out "
            "run.fork and run.parent to go on with it"
        )


def record_parent(config: PretrainConfig, checkpoint: WholeCheckpoint) -> None:
    """Writes down what a run began from; for the main process."""
    folder = config.run.folder
    different = _differences(config, fingerprints_of_run(folder))
    values = {
        "folder": str(config.run.parent.resolve()),
        "checkpoint": checkpoint.location,
        "step": checkpoint.record.state.step,
        "model_sha256": checkpoint.record.model_sha256,
        "marks": list(checkpoint.record.state.tags),
        "differs_in": {key: {"parent": a, "fork": b} for key, (a, b) in different.items()},
    }
    write_atomically(folder / PARENT_FILE, json.dumps(values, indent=2).encode() + b"\n")


def _differences(
    config: PretrainConfig, fingerprints: dict[str, str]
) -> dict[str, tuple[Any, Any]]:
    parent = config.run.parent
    store = store_of_run(str(parent))
    return differences_to_run(config, fingerprints=fingerprints, folder=parent, store=store)


def origin_of_checkpoints(config: PretrainConfig) -> dict[str, Any]:
    """What the record of every checkpoint says of where it comes from: the engine's strategy, and
    what `record_parent` wrote if the run is a fork."""
    path = config.run.folder / PARENT_FILE
    parent = {"parent": json.loads(path.read_text())} if path.exists() else {}
    return {"strategy": config.engine.strategy} | parent
