"""Which configs are the same run: all that agree but for fields marked `free`, on the same data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.config_file import (
    differing_keys,
    fixed_values,
    read_config,
)
from data_prep.errors import ConfigError
from pretrain.checkpoints.store import CheckpointStore, open_store
from pretrain.config import PretrainConfig


def holds_run(folder: Path) -> bool:
    """Whether a run has begun in a folder."""
    return (folder / "config.yaml").exists()


def refuse_other_run(config: PretrainConfig, *, fingerprints: dict[str, str]) -> None:
    """
    Raises:
        ConfigError: the run folder holds a run whose config or data differ; the keys are named.
    """
    folder = config.run.folder
    if not holds_run(folder):
        return
    store = open_store(config.run.checkpoints)
    different = differences_to_run(config, fingerprints=fingerprints, folder=folder, store=store)
    if different:
        lines = [f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in different.items()]
        raise ConfigError(
            f"{folder} holds a run that differs from this config:\n"
            + "\n".join(lines)
            + "\nresume it with its own config, set run.folder to a new folder, or set "
            "run.fork=true to begin a run of this config from its newest checkpoint"
        )


def differences_to_run(
    config: PretrainConfig, *, fingerprints: dict[str, str], folder: Path, store: CheckpointStore
) -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (value there, value here) of what keeps a config from being a folder's run.

    Args:
        config: that would go on with the run.
        fingerprints: of everything that it reads.
        folder: of a run.
        store: of its checkpoints.
    """
    earlier = read_config(PretrainConfig, folder / "config.yaml")
    known = fingerprints_of_run(folder)
    checkpoints = store.checkpoints()
    steps_done = checkpoints[0].step if checkpoints else 0  # whole or not
    old, new = (_what_has_been(each, steps_done) for each in (earlier, config))
    different = differing_keys(fixed_values(old), fixed_values(new))
    different |= differing_keys(
        _fingerprints_of(old, known), _fingerprints_of(new, fingerprints), prefix="fingerprint"
    )
    if config.schedule.shape == "constant":  # which has no end that its rates depend on
        different.pop("schedule.num_steps", None)
    return different


def fingerprints_of_run(folder: Path) -> dict[str, str]:
    """Of everything that the run in a folder reads."""
    return json.loads((folder / "environment.json").read_text())["dataset_fingerprints"]


def _what_has_been(config: PretrainConfig, steps_done: int) -> PretrainConfig:
    """The config without the segments that no step has used yet: those may still change."""
    pairings = {
        name: pairing.model_copy(
            update={"segments": [each for each in pairing.segments if each.from_step < steps_done]}
        )
        for name, pairing in config.pairings.items()
    }
    return config.model_copy(update={"pairings": pairings})


def _fingerprints_of(config: PretrainConfig, fingerprints: dict[str, str]) -> dict[str, str]:
    """Those of the sources that a config names, of its validation sets and teachers."""
    names = {
        f"{name}/{source.name}"
        for name, pairing in config.pairings.items()
        for source in pairing.all_sources
    }
    return {
        key: value
        for key, value in fingerprints.items()
        if key in names or key.startswith(("validation/", "teacher/"))
    }
