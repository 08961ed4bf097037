"""Sections of objectives in the config, each validated by the class of its `kind`."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, get_args

from pydantic import PositiveFloat

from data_prep.config_file import Section
from pretrain.settings.warm_start import Start

if TYPE_CHECKING:
    from torch import nn

OBJECTIVES = "pretrain.objectives"  # package with one module per objective
DEFAULT_KIND = "contrastive"
_SECTIONS: dict[str, type[ObjectiveSection]] = {}  # `kind` key of the config -> section


class ObjectiveSection(Section):
    """Settings shared by all objectives; each adds `kind: Literal["its_name"]`.

    Its class is registered under this kind.
    """

    # streams_per_step all: the loss of a step is the sum of weight * loss over its objectives
    weight: PositiveFloat = 1.0

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        (kind,) = get_args(cls.model_fields["kind"].annotation)
        _SECTIONS[kind] = cls

    def views(self, name: str) -> tuple[str, ...]:
        """Returns the views of a sample that the objective reads.

        Args:
            name: name of the objective, from which it may derive them.
        """
        raise NotImplementedError

    def temperature_name(self, name: str) -> str | None:
        """Returns the name of the learned temperature that it uses; None for none."""
        return None

    @property
    def has_bias(self) -> bool:
        """Whether its temperature has a learned bias."""
        return False

    @property
    def projects(self) -> bool:
        """Whether it has a projection of its own for each tower."""
        return False

    @property
    def nested_dims(self) -> list[int]:
        """Numbers of first elements of an embedding that are trained to be embeddings as well."""
        return []

    @property
    def contrasts_repeats(self) -> bool:
        """Whether a sample that is twice in a step is a negative of itself."""
        return False

    @property
    def reads_tokens(self) -> bool:
        """Whether it reads tokens of the towers through a module of its own, and no features."""
        return False

    @property
    def module_start(self) -> Start | None:
        """Weights of its module at step 0; None for random ones."""
        return None

    def build_module(self, towers: Sequence[Any], *, tokenizer: Any, where: str) -> nn.Module:
        """Builds the module of an objective that reads tokens.

        The module takes a `ViewTokens` (see pretrain.captioning) of each view, for samples that
        have all of them, and returns [B, K], numbers of each sample.

        Args:
            towers: tower of each view, which gives tokens.
            tokenizer: tokenizer of texts; None without a text tower.
            where: config key of the objective, for messages.

        Raises:
            InputError: if the towers do not fit.
        """
        raise NotImplementedError

    def for_validation(self) -> Self:
        """Returns the settings for held-out data, without what only regularises training."""
        return self


@dataclass(frozen=True)
class ModuleUse:
    """The use of a module by an objective of a stream.

    Attributes:
        objective: name of the objective.
        module: name of the module, which objectives of the same name and towers share.
        views: views whose tokens it takes.
        towers: tower of each view.
        section: settings of the objective.
        where: config key of the objective.
    """

    objective: str
    module: str
    views: tuple[str, ...]
    towers: tuple[str, ...]
    section: ObjectiveSection
    where: str


def starts_of_modules(uses: Mapping[str, Sequence[ModuleUse]]) -> dict[str, ModuleUse]:
    """Returns {module: one of its uses} of the modules of objectives that have a source.

    Args:
        uses: see `PretrainConfig.modules`.
    """
    flat = [use for of_stream in uses.values() for use in of_stream]
    return {use.module: use for use in flat if use.section.module_start is not None}


def import_objectives() -> None:
    """Imports all modules of the package of objectives, which registers their sections."""
    for module in pkgutil.iter_modules(importlib.import_module(OBJECTIVES).__path__):
        importlib.import_module(f"{OBJECTIVES}.{module.name}")


def validate_section(values: Any) -> Any:
    """Validates the config of one objective with the section class of its kind.

    Raises:
        ValueError: if `kind` is not the name of an objective.
    """
    if values is None:
        values = {}
    if not isinstance(values, dict):
        return values  # pydantic accepts a section, and reports anything else as an error
    import_objectives()
    known, kind = dict(_SECTIONS), values.get("kind", DEFAULT_KIND)
    if kind not in list(known):
        raise ValueError(f"kind: expected one of {', '.join(sorted(known))}; found {kind!r}")
    return known[kind].model_validate(values)
