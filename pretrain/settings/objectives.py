"""Sections of objectives in the config, each validated by the class of its `kind`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any, Self, get_args

from pydantic import PositiveFloat

from data_prep.config_file import Section

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

    def for_validation(self) -> Self:
        """Returns the settings for held-out data, without what only regularises training."""
        return self


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
