"""The identity of a run: one run is all configs with equal fixed fields, on the same data.

Fields marked `free` may differ.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config_file import (
    differing_keys,
    fixed_values,
    read_stored_config,
)
from data_prep.errors import ConfigError
from pretrain.checkpoints.store import CheckpointStore, open_store
from pretrain.config import Pairing, PairingName, PretrainConfig


@dataclass(frozen=True)
class RunIdentity:
    """The config of a run, and the fingerprints of everything that it reads.

    A fingerprint has the key "<pairing>/<source>", "validation/<pairing>" or "teacher/<pairing>".
    """

    config: PretrainConfig
    fingerprints: Mapping[str, str]

    def refuse_other_run(self) -> None:
        """Checks that the run folder holds this run, or none.

        Raises:
            ConfigError: if its config or data differ; the keys are named.
        """
        run = self.config.run
        if not holds_run(run.folder):
            return
        different = self.differences_to(run.folder, store=open_store(run.checkpoints))
        if different:
            lines = [
                f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in different.items()
            ]
            raise ConfigError(
                f"{run.folder} holds a run that differs from this config:\n"
                + "\n".join(lines)
                + "\nresume it with its own config, set run.folder to a new folder, or set "
                "run.fork=true to begin a run of this config from its newest checkpoint"
            )

    def differences_to(self, folder: Path, *, store: CheckpointStore) -> dict[str, tuple[Any, Any]]:
        """Returns {dotted key: (value there, value here)} of what makes another run of a folder.

        Args:
            folder: run folder to compare with.
            store: checkpoints of the run in that folder.
        """
        there = RunIdentity(
            read_stored_config(PretrainConfig, folder / "config.yaml"), fingerprints_of_run(folder)
        )
        checkpoints = store.checkpoints()
        steps_done = checkpoints[0].step if checkpoints else 0  # whole or not
        old, new = (each._as_used(steps_done) for each in (there, self))
        different = differing_keys(fixed_values(old.config), fixed_values(new.config))
        different |= differing_keys(old.fingerprints, new.fingerprints, prefix="fingerprint")
        if self.config.schedule.shape == "constant":  # its rates do not depend on its end
            different.pop("schedule.num_steps", None)
        return different

    def _as_used(self, steps_done: int) -> RunIdentity:
        """Returns the identity without segments that no step has used yet: those may change."""
        pairings: dict[PairingName, Pairing] = {
            name: pairing.model_copy(
                update={
                    "segments": [each for each in pairing.segments if each.from_step < steps_done]
                }
            )
            for name, pairing in self.config.pairings.items()
        }
        sources = {
            f"{name}/{source.name}"
            for name, pairing in pairings.items()
            for source in pairing.all_sources
        }
        fingerprints = {
            key: value
            for key, value in self.fingerprints.items()
            if key in sources or key.startswith(("validation/", "teacher/"))
        }
        return RunIdentity(self.config.model_copy(update={"pairings": pairings}), fingerprints)


def holds_run(folder: Path) -> bool:
    """Returns whether a run was created in a folder."""
    return (folder / "config.yaml").exists()


def fingerprints_of_run(folder: Path) -> dict[str, str]:
    """Returns the fingerprints of everything that the run in a folder reads."""
    return json.loads((folder / "environment.json").read_text())["dataset_fingerprints"]
