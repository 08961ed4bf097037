"""The config.yaml of a run folder: written sealed, verified when it is read."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from data_prep.config_file import read_stored_config, read_yaml, to_yaml
from data_prep.errors import ConfigError
from data_prep.storage.atomic import write_atomically
from data_prep.storage.sealed import has_valid_seal, to_sealed_yaml, warn_once
from pretrain.config import PretrainConfig

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.yaml"
SECTIONS = ("run", "schedule", "engine")  # those that readers of plain values look into


def write_config(folder: Path, config: PretrainConfig) -> None:
    """Writes the resolved config of a run.

    Raises:
        OSError: if the file cannot be written.
    """
    write_atomically(folder / CONFIG_FILE, to_sealed_yaml(to_yaml(config)))


def read_config_of_run(folder: Path) -> PretrainConfig:
    """Reads the config that this or an earlier version wrote, without removed keys.

    Raises:
        ConfigError: if the file is damaged; the message says how to restore it.
    """
    is_intact = _verify_seal(folder)
    try:
        return read_stored_config(PretrainConfig, folder / CONFIG_FILE)
    except ConfigError as error:
        raise _with_remedy(folder, error, is_intact=is_intact) from None


def read_values_of_run(folder: Path) -> dict[str, Any]:
    """Reads the config of a run as plain values, which is faster and needs no known keys.

    Raises:
        ConfigError: if the file is damaged; the message says how to restore it.
    """
    path = folder / CONFIG_FILE
    is_intact = _verify_seal(folder)
    try:
        values = read_yaml(path)
        for name in SECTIONS:
            if not isinstance(values.get(name, {}), dict):
                raise ConfigError(
                    f"{path}: {name}: expected a mapping of keys to values, found {values[name]!r}"
                )
    except ConfigError as error:
        raise _with_remedy(folder, error, is_intact=is_intact) from None
    return values


def _verify_seal(folder: Path) -> bool:
    """Whether the seal is intact; logs a warning if it is damaged."""
    path = folder / CONFIG_FILE
    is_valid = has_valid_seal(path.read_bytes()) if path.is_file() else None
    if is_valid is False:
        warn_once(
            logger,
            f"{path}: damaged: expected the sha256 in its first line, found another content; "
            f"{_remedy(folder)}",
        )
    return bool(is_valid)


def _with_remedy(folder: Path, error: ConfigError, *, is_intact: bool) -> ConfigError:
    if is_intact:  # written by another version
        return error
    return ConfigError(f"{' '.join(str(error).split())}; {_remedy(folder)}")


def _remedy(folder: Path) -> str:
    copies = sorted((folder / "checkpoints").glob(f"step_*/{CONFIG_FILE}"))
    copy = copies[-1] if copies else f"the {CONFIG_FILE} of the run's newest checkpoint"
    return f"restore it: copy {copy} to {folder / CONFIG_FILE}"
