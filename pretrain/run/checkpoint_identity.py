"""The identity of a run as its checkpoints store it: their config.yaml and their record.

It is compared before a checkpoint is used, because run.checkpoint_folder may hold the checkpoints
of another run whose parameters have the same shapes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from data_prep.config_file import read_stored_config
from data_prep.errors import ConfigError
from pretrain.checkpoints.record import CheckpointRecord, read_record
from pretrain.checkpoints.store import (
    DamagedCheckpointError,
    open_store,
    read_file,
    verify_file,
)
from pretrain.config import PretrainConfig
from pretrain.run.compatibility import RunIdentity, describe_differences
from pretrain.stored_config import CONFIG_FILE

FINGERPRINTS_IN_RECORD = "fingerprints"  # key in the record's `written_by`


def refuse_checkpoints_of_other_run(identity: RunIdentity) -> None:
    """Checks that the folder of the checkpoints holds those of this run, or none.

    Raises:
        ConfigError: if the run of its newest readable checkpoint differs in config or data; the
            message lists the keys.
    """
    for each in open_store(identity.config.run.checkpoints).checkpoints():
        try:
            refuse_checkpoint_of_other_run(identity, each.location, read_record(each.location))
        except DamagedCheckpointError:
            continue  # named when the run resumes
        return


def refuse_checkpoint_of_other_run(
    identity: RunIdentity, location: str, record: CheckpointRecord
) -> None:
    """Checks that a checkpoint was written by this run, or a run of equal config and data.

    Args:
        identity: identity of this run.
        location: path or URL of the checkpoint.
        record: record of the checkpoint.

    Raises:
        ConfigError: if config or data differ; the message lists the keys.
        DamagedCheckpointError: if its config.yaml is damaged.
    """
    if CONFIG_FILE not in record.files:
        return
    stored = identity_in_checkpoint(location, record, unknown=identity)
    different = identity.differences_from(stored, steps_done=record.state.step)
    if different:
        run = identity.config.run
        raise ConfigError(
            f"{location} is the checkpoint of a run that differs from this config:\n"
            + describe_differences(different, where="in the checkpoint")
            + f"\nset run.checkpoint_folder to another folder than {run.checkpoints}; to start "
            "from that run's state, set run.parent to its folder"
        )


def identity_in_checkpoint(
    location: str, record: CheckpointRecord, *, unknown: RunIdentity
) -> RunIdentity:
    """Returns the identity of the run that wrote a checkpoint.

    Args:
        location: path or URL of the checkpoint.
        record: record of the checkpoint.
        unknown: identity whose fingerprints are used if an earlier version wrote the checkpoint.

    Raises:
        ConfigError: if this version cannot read the config.
        DamagedCheckpointError: if the config is damaged.
    """
    earlier = {**unknown.fingerprints, **unknown.first_versions}
    fingerprints = record.written_by.get(FINGERPRINTS_IN_RECORD, earlier)
    return RunIdentity(config_of_checkpoint(location, record), fingerprints)


def config_of_checkpoint(location: str, record: CheckpointRecord) -> PretrainConfig:
    """Reads the config of the run that wrote a checkpoint, after verifying it.

    Raises:
        ConfigError: if this version cannot read the config.
        DamagedCheckpointError: if the config is damaged.
    """
    verify_file(location, CONFIG_FILE, record.files[CONFIG_FILE])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_bytes(read_file(location, CONFIG_FILE))
        try:
            return read_stored_config(PretrainConfig, path)
        except ConfigError as error:
            message = str(error).replace(str(path), f"{location}/{CONFIG_FILE}")
            raise ConfigError(message) from None
