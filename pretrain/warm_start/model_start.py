"""Warm start of a new model: towers, then temperatures, from the sources that a config names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from data_prep.errors import InputError
from data_prep.storage.atomic import write_atomically
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.settings.model import Model
from pretrain.settings.warm_start import Start
from pretrain.warm_start.key_table import KeyTable
from pretrain.warm_start.laion_clap import refuse_other_spectrogram
from pretrain.warm_start.layouts import read_layout
from pretrain.warm_start.source import WeightSource, find_source
from pretrain.warm_start.temperature import common_source, start_temperature
from pretrain.warm_start.tower_start import start_tower

WARM_START_FILE = "warm_start.json"  # in the run folder


@dataclass(frozen=True)
class WarmStart:
    """The account of a model's warm start.

    Attributes:
        tables: one per tower that has a source.
        temperatures: a sentence for each temperature.
    """

    tables: tuple[KeyTable, ...] = ()
    temperatures: tuple[str, ...] = ()

    def describe(self, fingerprints: Mapping[str, str]) -> list[str]:
        """Describes the sources of all tensors, line by line.

        Args:
            fingerprints: result of `start_fingerprints`.
        """
        lines = [
            line
            for table in self.tables
            for line in table.describe(sha256=fingerprints[start_key(table.kind)])
        ]
        return [*lines, *self.temperatures]

    def write(self, run_folder: Path, fingerprints: Mapping[str, str]) -> None:
        """Writes the account into a run folder, unless it is there; for the main process.

        Args:
            run_folder: run folder.
            fingerprints: result of `start_fingerprints`.
        """
        path = run_folder / WARM_START_FILE
        if not self.tables or path.exists():
            return
        towers = {
            table.kind: {"sha256": fingerprints[start_key(table.kind)]} | asdict(table)
            for table in self.tables
        }
        values = {"towers": towers, "temperatures": list(self.temperatures)}
        write_atomically(path, json.dumps(values, indent=1).encode())


def starts_of(config: Model) -> dict[str, Start]:
    """Returns {tower: config section} of the towers that have a source."""
    return {name: each.start for name, each in config.towers.items() if each.start is not None}


def start_key(kind: str) -> str:
    """Returns the key of a tower's warm start among the fingerprints of a run."""
    return f"model.{kind}.start"


def start_fingerprints(config: Model) -> dict[str, str | None]:
    """Computes {key: fingerprint of the source's files}; None for a source that is gone."""
    found: dict[str, str | None] = {}
    known: dict[str, str | None] = {}
    for kind, start in starts_of(config).items():
        if start.location not in known:
            try:
                source = find_source(start.location, where=start_key(kind))
                known[start.location] = source.fingerprint()
            except InputError:
                known[start.location] = None
        found[start_key(kind)] = known[start.location]
    return found


def start_model(
    model: ContrastiveModel,
    config: Model,
    *,
    towers: Mapping[str, Collection[str]],
) -> WarmStart:
    """Sets the weights of a new model to those of the sources that its config names.

    Args:
        model: new model, changed in place.
        config: config section `model`.
        towers: name of each temperature -> towers whose features it scales.

    Raises:
        InputError: if a source cannot be used, or does not account for every tensor.
    """
    starts = starts_of(config)
    temperatures: dict[str, Mapping[str, Tensor]] = {}
    tables = []
    tensors = {place: source.read() for place, source in _find_sources(config).items()}
    for name, start in starts.items():
        kind = config.kinds[name]
        layout = read_layout(tensors[start.location], kind=start.tower or kind)
        part = start.tower or (name if name in layout.towers else kind)
        library = config.towers[name].library
        where = f"{config.tower_key(name)}.start"
        refuse_other_spectrogram(
            tensors[start.location],
            model.towers[name].input_stage,
            where=f"{where}.from={start.location}",
        )
        rows = start_tower(
            model.towers[name], layout, start, part=part, where=where, library=library
        )
        temperatures[start.location] = layout.temperatures
        tables.append(KeyTable(name, start.location, tuple(rows)))
    done = [
        start_temperature(
            model,
            name,
            common_source(towers[name], starts, temperatures),
            maximum=config.logit_scale.maximum,
        )
        for name in (model.log_logit_scale if starts else ())
    ]
    return WarmStart(tuple(tables), tuple(done))


def _find_sources(config: Model) -> dict[str, WeightSource]:
    """{location: source}; two towers of one source read it once"""
    return {
        start.location: find_source(start.location, where=f"{config.tower_key(name)}.start.from")
        for name, start in starts_of(config).items()
    }
