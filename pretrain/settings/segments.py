"""Settings that change at steps: numbers of steps done -> values from then on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def value_at(values: Mapping[int, T], step: int) -> T:
    """Returns the value with the largest key that is at most `step`."""
    return values[max(start for start in values if start <= step)]


def check_rising_steps(steps: Sequence[int], *, name: str) -> None:
    """Checks that every entry of a list begins later than the one before it.

    Args:
        steps: first step of each entry.
        name: name of the entries, for the message.

    Raises:
        ValueError: if one does not.
    """
    if list(steps) != sorted(set(steps)):
        raise ValueError(f"expected {name} with rising from_step, found {list(steps)}")
