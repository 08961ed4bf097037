"""The identity of a run: configs with equal fixed fields and the same data belong to one run.

Fields marked `free` may differ.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config_file import differing_keys, fixed_values
from data_prep.errors import ConfigError
from data_prep.storage.sealed import DamagedFileError, check_types, read_sealed_json, warn_once
from pretrain.checkpoints.store import CheckpointStore, open_store
from pretrain.config import PretrainConfig
from pretrain.settings.data import Stream, StreamName
from pretrain.stored_config import CONFIG_FILE, read_config_of_run

logger = logging.getLogger(__name__)

ENVIRONMENT_FILE = "environment.json"
FINGERPRINTS_KEY = "dataset_fingerprints"
DRAWS = "draws"  # key of the version of random numbers
OF_MODEL = "model."  # prefix of the fingerprints of a model's files
ENVIRONMENT_KEYS = (FINGERPRINTS_KEY, "python", "platform", "git_commit", "packages")


@dataclass(frozen=True)
class RunIdentity:
    """The config of a run and the fingerprints of everything that it reads.

    A fingerprint has the key "<stream>/<source>", "validation/<stream>", "teacher/<stream>" or,
    for files of the model, a key of pretrain.model.source_files. "mixing/<stream>" is the version
    of the order of a stream with several sources.

    Attributes:
        copied_sources: keys of the sources that are gone, and replaced by a checkpoint's copy.
    """

    config: PretrainConfig
    fingerprints: Mapping[str, str]
    copied_sources: tuple[str, ...] = ()

    def refuse_other_run(self) -> None:
        """Checks that the run folder holds this run or no run.

        Raises:
            ConfigError: if its config or data differ; the message lists the keys.
        """
        run = self.config.run
        if not holds_run(run.folder):
            return
        different = self.differences_to(run.folder, store=open_store(run.checkpoints))
        if different:
            resume = "resume it with its own config"
            if any(key.startswith("fingerprint.mixing/") for key in different):
                resume = (
                    "this version of Isopair mixes sources in another order than the one that "
                    "began the run: finish the run with that version"
                )
            elif f"fingerprint.{DRAWS}" in different:
                resume = (
                    "this version of Isopair draws other crops and captions than the one that "
                    "began the run: finish the run with that version"
                )
            raise ConfigError(
                f"{run.folder} holds a run that differs from this config:\n"
                + describe_differences(different, where="in the run folder")
                + f"\n{resume}, set run.folder to a new folder, or set "
                "run.fork=true to start a run of this config from its newest checkpoint"
            )

    def differences_to(self, folder: Path, *, store: CheckpointStore) -> dict[str, tuple[Any, Any]]:
        """Returns {dotted key: (value in the run folder, value in this config)} of all differences.

        Args:
            folder: run folder to compare with.
            store: checkpoints of the run in that folder.
        """
        fingerprints = fingerprints_of_run(folder)
        if fingerprints is None:
            fingerprints = self.fingerprints
        stored = RunIdentity(read_config_of_run(folder), self.first_versions | fingerprints)
        checkpoints = store.checkpoints()
        steps_done = checkpoints[0].step if checkpoints else 0  # valid or not
        return self.differences_from(stored, steps_done=steps_done)

    @property
    def first_versions(self) -> dict[str, str]:
        """Fingerprints of mixed sources and of random numbers in versions that stored none."""
        return {
            key: "version 1"
            for key in self.fingerprints
            if key.startswith("mixing/") or key == DRAWS
        }

    def differences_from(
        self, stored: RunIdentity, *, steps_done: int
    ) -> dict[str, tuple[Any, Any]]:
        """Returns {dotted key: (value of the other, own value)} of all differences.

        Args:
            stored: identity to compare with.
            steps_done: number of steps done. Segments that begin later may differ.
        """
        old, new = (each._as_used(steps_done) for each in (stored, self))
        different = differing_keys(fixed_values(old.config), fixed_values(new.config))
        # Earlier versions stored no fingerprints of the model's files.
        known = old.fingerprints.keys() & new.fingerprints.keys()
        fingerprints = [
            {k: value for k, value in each.items() if k in known or not k.startswith(OF_MODEL)}
            for each in (old.fingerprints, new.fingerprints)
        ]
        different |= differing_keys(*fingerprints, prefix="fingerprint")
        if self.config.schedule.shape == "constant":  # the rates do not depend on num_steps
            different.pop("schedule.num_steps", None)
        return different

    def _as_used(self, steps_done: int) -> RunIdentity:
        """Returns the identity without segments, and entries of `unfreeze`, that no step has used.

        These may change.
        """
        streams: dict[StreamName, Stream] = {
            name: stream.model_copy(
                update={
                    "segments": [each for each in stream.segments if each.from_step < steps_done]
                }
            )
            for name, stream in self.config.streams.items()
        }
        sources = {
            f"{name}/{source.name}"
            for name, stream in streams.items()
            for source in stream.all_sources
        }
        mixed = {f"mixing/{name}" for name, each in streams.items() if each.is_mixed}
        known = sources | mixed | {DRAWS}
        fingerprints = {
            key: value
            for key, value in self.fingerprints.items()
            if key in known or key.startswith(("validation/", "teacher/", OF_MODEL))
        }
        image = self.config.image
        used = [each for each in image.segments if each.from_step < steps_done]
        image = image.model_copy(update={"segments": used})
        opened = [each for each in self.config.optimizer.unfreeze if each.from_step < steps_done]
        optimizer = self.config.optimizer.model_copy(update={"unfreeze": opened})
        changes = {"streams": streams, "image": image, "optimizer": optimizer}
        config = self.config.model_copy(update=changes)
        return RunIdentity(config, fingerprints)


def describe_differences(different: Mapping[str, tuple[Any, Any]], *, where: str) -> str:
    """Describes differences, one per line.

    Args:
        different: {dotted key: (stored value, value in this config)}.
        where: place of the stored values.
    """
    lines = [
        f"  {key}: {old!r} {where}, {new!r} in this config" for key, (old, new) in different.items()
    ]
    changed = [key for key in different if key.startswith(f"fingerprint.{OF_MODEL}")]
    if changed:
        lines.append(
            f"{changed[0]}: the files that this setting names have changed; restore them, or "
            "delete them, and their copy in the newest checkpoint is used"
        )
    return "\n".join(lines)


def holds_run(folder: Path) -> bool:
    """Returns whether a run was created in a folder."""
    return (folder / CONFIG_FILE).exists()


def fingerprints_of_run(folder: Path) -> dict[str, str] | None:
    """Returns the fingerprints of everything that the run in a folder reads.

    Returns None if the file was deleted, and logs a warning.

    Raises:
        ConfigError: if the file is damaged.
    """
    path = folder / ENVIRONMENT_FILE
    try:
        return parse_fingerprints(path.read_bytes())
    except FileNotFoundError:
        warn_once(
            logger,
            f"{path}: missing: the data of this start is only compared with that of the newest "
            "checkpoint",
        )
        return None
    except DamagedFileError as error:
        raise ConfigError(
            f"{path}: damaged: {error}; if the data is still the same, delete this file: the next "
            "start compares the data with that of the newest checkpoint and writes the file anew"
        ) from None


def parse_fingerprints(content: bytes) -> dict[str, str]:
    """Parses the fingerprints in the content of environment.json.

    Raises:
        DamagedFileError: if it is damaged.
    """
    values, _ = read_sealed_json(content, unsealed_keys=ENVIRONMENT_KEYS)
    check_types(values, {FINGERPRINTS_KEY: dict[str, str]})
    return values[FINGERPRINTS_KEY]
