"""Columns that a user keeps besides ours: the type of each, and its values as that type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.config_file import InputError
from data_prep.shards.columns import KeptType, own_columns


def check_kept_names(names: Iterable[str], *, media_kind: str) -> None:
    """
    Raises:
        InputError: a column to keep has the name of one of ours.
    """
    taken = own_columns(media_kind).intersection(names)
    if taken:
        raise InputError(
            f"keep_columns: the Parquet has columns {', '.join(sorted(taken))} of its own; rename "
            "yours in the input, or leave them out"
        )


class KeptTypes:
    """The narrowest type that holds all values of each column to keep."""

    def __init__(self, columns: Iterable[str]):
        self.known: dict[str, KeptType | None] = dict.fromkeys(columns)

    def add(self, values: Mapping[str, Any]) -> None:
        """Takes the values of one sample into account."""
        for name in self.known:
            self.known[name] = common_type(self.known[name], type_of(values.get(name)))

    def merge(self, other: Mapping[str, KeptType | None]) -> None:
        """Takes the types of other samples into account."""
        for name, kind in other.items():
            self.known[name] = common_type(self.known[name], kind)

    def types(self, *, found_in: str) -> dict[str, KeptType]:
        """The type of each column.

        Args:
            found_in: the input, for the message.

        Raises:
            InputError: a column to keep has no value anywhere.
        """
        for name, kind in self.known.items():
            if kind is None:
                raise InputError(
                    f"{found_in}: keep_columns: {name!r} has no value in any row; check its "
                    "spelling, or leave it out"
                )
        return {name: kind for name, kind in self.known.items() if kind is not None}


def type_of(value: Any) -> KeptType | None:
    """The narrowest type that holds a value; None for no value."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return "int64"
    return "double" if isinstance(value, float) else "string"


def common_type(first: KeptType | None, second: KeptType | None) -> KeptType | None:
    """The narrowest type that holds values of both."""
    if first == second or second is None:
        return first
    if first is None:
        return second
    return "double" if {first, second} == {"int64", "double"} else "string"


def kept_value(value: Any, kind: KeptType) -> Any:
    """A value of a column to keep, as the column's type takes it."""
    if value is None:
        return None
    if kind == "double":
        return float(value)
    if kind == "string" and not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return value
