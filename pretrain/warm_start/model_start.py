"""Warm start of a new model: towers, then temperatures, from the sources that a config names."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from data_prep.errors import InputError
from data_prep.storage.atomic import write_atomically
from pretrain.config import PretrainConfig
from pretrain.model.contrastive_model import ContrastiveModel
from pretrain.settings.model import Model
from pretrain.settings.objectives import ModuleUse, starts_of_modules
from pretrain.settings.warm_start import Start
from pretrain.warm_start.key_table import KeyTable
from pretrain.warm_start.laion_clap import refuse_other_spectrogram
from pretrain.warm_start.layouts import TEXT_DECODER, read_layout
from pretrain.warm_start.source import find_source
from pretrain.warm_start.temperature import common_source, start_temperature
from pretrain.warm_start.tower_start import start_module, start_tower

WARM_START_FILE = "warm_start.json"  # in the run folder


@dataclass(frozen=True)
class WarmStart:
    """The account of a model's warm start.

    Attributes:
        tables: one per tower, and per module of an objective, that has a source.
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


def all_starts(config: PretrainConfig) -> dict[str, Start]:
    """Returns {tower or module of an objective: config section} of those that have a source."""
    of_modules = starts_of_modules(config.modules)
    return starts_of(config.model) | {
        name: use.section.module_start for name, use in of_modules.items()
    }


def start_key(name: str) -> str:
    """Returns the key of a warm start among the fingerprints of a run.

    Args:
        name: name of a tower, or of a module of an objective, which has a colon.
    """
    return f"{'objectives' if ':' in name else 'model'}.{name}.start"


def start_fingerprints(starts: Mapping[str, Start]) -> dict[str, str | None]:
    """Computes {key: fingerprint of the source's files}; None for a source that is gone.

    Args:
        starts: result of `all_starts`.
    """
    found: dict[str, str | None] = {}
    known: dict[str, str | None] = {}
    for kind, start in starts.items():
        if start.source not in known:
            try:
                source = find_source(start.location, where=start_key(kind), weights=start.weights)
                known[start.source] = source.fingerprint()
            except InputError:
                known[start.source] = None
        found[start_key(kind)] = known[start.source]
    return found


def start_model(
    model: ContrastiveModel,
    config: Model,
    *,
    towers: Mapping[str, Collection[str]],
    modules: Mapping[str, Sequence[ModuleUse]] | None = None,
) -> WarmStart:
    """Sets the weights of a new model to those of the sources that its config names.

    Args:
        model: new model, changed in place.
        config: config section `model`.
        towers: name of each temperature -> towers whose features it scales.
        modules: modules of objectives, see `PretrainConfig.modules`.

    Raises:
        InputError: if a source cannot be used, or does not account for every tensor.
    """
    starts = starts_of(config)
    temperatures: dict[str, Mapping[str, Tensor]] = {}
    tables = []
    of_modules = starts_of_modules(modules or {})
    places = [(start, f"{config.tower_key(name)}.start.from") for name, start in starts.items()]
    places += [(use.section.module_start, f"{use.where}.start.from") for use in of_modules.values()]
    tensors: dict[str, dict[str, Tensor]] = {}
    for start, key in places:
        if start.source not in tensors:
            found = find_source(start.location, where=key, weights=start.weights)
            tensors[start.source] = found.read()
    for name, start in starts.items():
        kind = config.kinds[name]
        layout = read_layout(tensors[start.source], kind=start.tower or kind)
        part = start.tower or (name if name in layout.towers else kind)
        library = config.towers[name].library
        where = f"{config.tower_key(name)}.start"
        refuse_other_spectrogram(
            tensors[start.source],
            model.towers[name].input_stage,
            where=f"{where}.from={start.location}",
        )
        rows = start_tower(
            model.towers[name], layout, start, part=part, where=where, library=library
        )
        temperatures[start.source] = layout.temperatures
        tables.append(KeyTable(name, start.source, tuple(rows)))
    for name, use in of_modules.items():
        start = use.section.module_start
        layout = read_layout(tensors[start.source], kind=TEXT_DECODER)
        part = start.tower or (name if name in layout.towers else TEXT_DECODER)
        rows = start_module(
            model.objective_modules[name], layout, start, part=part, where=f"{use.where}.start"
        )
        tables.append(KeyTable(name, start.source, tuple(rows)))
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
