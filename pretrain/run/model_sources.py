"""The tokenizer and the pretrained towers of a run, built from the sources that its config names.

A source that is gone is replaced by the copy in the run's newest checkpoint. The tokenizer and the
configs of towers are among its assets, and resuming loads all parameters. The fingerprints of the
sources are part of the run's identity.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from data_prep.config_file import fixed_values
from data_prep.errors import ConfigError, InputError
from pretrain.checkpoints.record import CheckpointRecord, read_record
from pretrain.checkpoints.store import (
    DamagedCheckpointError,
    open_store,
    read_file,
    store_of_run,
    verify_file,
)
from pretrain.config import PretrainConfig
from pretrain.model.source_files import fingerprint_of_files, tokenizer_files, tower_files
from pretrain.run.checkpoint_identity import FINGERPRINTS_IN_RECORD, config_of_checkpoint
from pretrain.run.compatibility import fingerprints_of_run, holds_run
from pretrain.warm_start.model_start import WarmStart, all_starts, start_fingerprints

Built = TypeVar("Built")
logger = logging.getLogger(__name__)

ASSETS = "assets"  # folder in a checkpoint


@dataclass(frozen=True)
class AssetsCopy:
    """Verified assets of a checkpoint."""

    location: str  # path or URL of the checkpoint
    folder: Path
    fingerprints: dict[str, str]  # those of the sources that the run was built from


class ModelSources:
    """Builds the parts of a run's model; a context that deletes temporary files at its end.

    Args:
        config: config of the run.
    """

    def __init__(self, config: PretrainConfig) -> None:
        self.config = config
        self._copy: AssetsCopy | None = None
        self._scratch: tempfile.TemporaryDirectory | None = None
        self._errors: dict[str, InputError] = {}  # key of a source that was replaced -> reason
        self.warm_start = WarmStart()  # of the model, once it is built

    def __enter__(self) -> ModelSources:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._scratch is not None:
            self._scratch.cleanup()

    @property
    def copied(self) -> tuple[str, ...]:
        """Keys of the sources that were replaced by a checkpoint's copy."""
        return tuple(self._errors)

    def build(self, keys: Collection[str], build: Callable[[Path | None], Built]) -> Built:
        """Builds a part from its sources or, if they cannot be read, from a checkpoint's assets.

        Args:
            keys: config keys of its sources; without any, nothing can replace them.
            build: builds the part, given a folder of assets or None.

        Raises:
            InputError: if the part cannot be built, and no checkpoint of the run has its assets.
        """
        try:
            return build(None)
        except InputError as error:
            copy = self._open_copy() if keys else None
            if copy is None:
                raise
            try:
                built = build(copy.folder)
            except InputError:
                raise error from None  # its reason is not a missing source
            self._errors |= dict.fromkeys(keys, error)
            return built

    def fingerprints(self) -> dict[str, str]:
        """Computes {key: fingerprint} of the sources; for the main process.

        A source that is gone has the fingerprint that its run has stored.
        """
        found = {}
        files = tokenizer_files(self.config.model.text) | tower_files(self.config.model)
        of_starts = start_fingerprints(all_starts(self.config))
        computed = {k: fingerprint_of_files(each) if each else None for k, each in files.items()}
        for key, fingerprint in (computed | of_starts).items():
            if key in self._errors and fingerprint != self._copy.fingerprints.get(key):
                logger.warning(
                    "%s cannot be read (%s); its copy in %s is used",
                    key,
                    self._errors[key],
                    self._copy.location,
                )
                fingerprint = self._copy.fingerprints.get(key)
            if fingerprint is not None:
                found[key] = fingerprint
        return found

    def _open_copy(self) -> AssetsCopy | None:
        """The assets of the newest checkpoint that was written with the same towers."""
        if self._copy is None:
            self._scratch = tempfile.TemporaryDirectory(prefix="isopair-")
            for location in self._locations():
                try:
                    self._copy = self._read_copy(location)
                except (DamagedCheckpointError, ConfigError, OSError):
                    continue  # named when the run resumes
                if self._copy is not None:
                    break
        return self._copy

    def _locations(self) -> Iterator[str]:
        run = self.config.run
        stores = [open_store(run.checkpoints)]
        if run.parent is not None:
            stores.append(store_of_run(str(run.parent)))
        for store in stores:
            yield from (each.location for each in store.checkpoints())

    def _read_copy(self, location: str) -> AssetsCopy | None:
        record = read_record(location)
        model = config_of_checkpoint(location, record).model
        if fixed_values(model) != fixed_values(self.config.model):
            return None
        scratch = Path(tempfile.mkdtemp(dir=self._scratch.name))
        for name, file in record.files.items():
            if name.startswith(f"{ASSETS}/"):
                verify_file(location, name, file)
                path = scratch / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(read_file(location, name))
        (scratch / ASSETS).mkdir(exist_ok=True)
        return AssetsCopy(location, scratch / ASSETS, self._stored_fingerprints(record))

    def _stored_fingerprints(self, record: CheckpointRecord) -> dict[str, str]:
        stored = record.written_by.get(FINGERPRINTS_IN_RECORD)
        if stored is None and holds_run(self.config.run.folder):  # saved by an earlier version
            stored = fingerprints_of_run(self.config.run.folder)
        return stored or {}
