"""Dictionaries of towers and parameters whose names may be any, also `values` or `items`.

torch's dictionaries store their entries as attributes and refuse names of attributes that they have
already. Here, such a name ends in an underscore in the state: "towers.values_.projection.weight".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

_TAKEN = frozenset([*dir(nn.ModuleDict()), *dir(nn.ParameterDict())])


class _AnyName:
    """Mixin that translates names on their way into and out of a dictionary of torch."""

    @staticmethod
    def _attribute_of(name: str) -> str:
        return f"{name}_" if name.rstrip("_") in _TAKEN else name

    @staticmethod
    def _name_of(attribute: str) -> str:
        return attribute.removesuffix("_") if attribute.rstrip("_") in _TAKEN else attribute

    def __getitem__(self, name: str) -> Any:
        return super().__getitem__(self._attribute_of(name))

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(self._attribute_of(name), value)

    def __contains__(self, name: str) -> bool:
        return super().__contains__(self._attribute_of(name))

    def __iter__(self) -> Iterator[str]:
        return map(self._name_of, super().__iter__())

    def keys(self) -> list[str]:
        """Returns the names, in order."""
        return list(self)

    def values(self) -> list[Any]:
        """Returns the entries, in order."""
        return [self[name] for name in self]

    def items(self) -> list[tuple[str, Any]]:
        """Returns (name, entry), in order."""
        return [(name, self[name]) for name in self]


class NamedTowers(_AnyName, nn.ModuleDict):
    """Towers by name."""


class NamedParameters(_AnyName, nn.ParameterDict):
    """Parameters by name."""
