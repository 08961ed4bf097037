"""Named weights on their way from a source to a tower."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Weight(NamedTuple):
    """A tensor and the names in the source that it comes from."""

    names: tuple[str, ...]
    tensor: Tensor


Weights = dict[str, Weight]


def renamed(weights: Weights, names: dict[str, str]) -> Weights:
    """Returns weights under new names; those that are not in `names` keep theirs.

    A weight whose new name is taken keeps its old one, so that none is lost.
    """
    found: Weights = {}
    for name, weight in weights.items():
        new = names.get(name, name)
        found[name if new in found else new] = weight
    return found
