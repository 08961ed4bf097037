"""The edges of a histogram's bins: round numbers, in even steps or in even ratios."""

from __future__ import annotations

import math
from decimal import Decimal
from itertools import count

MOST_BINS = 32
# Ratios from here on, where half of the values would share one bin of even steps.
LONG_TAIL = 8
STEPS = (1, 2, 5)


def histogram_edges(
    least: float, median: float, largest: float, *, is_whole: bool
) -> tuple[list[float], bool]:
    """(edges of bins that hold their lower edge and not their upper one, are they in ratios?)

    The first edge is at most `least` and the last is above `largest`.

    Args:
        least: of the values.
        median: of the values.
        largest: of the values; above least.
        is_whole: whether all values are whole numbers; edges then are too.
    """
    if least > 0 and largest > LONG_TAIL * median:
        return _ratio_edges(least, largest, is_whole=is_whole), True
    return _step_edges(least, largest, is_whole=is_whole), False


def _ratio_edges(least: float, largest: float, *, is_whole: bool) -> list[float]:
    """Up to four in each doubling, exact as binary numbers: 1, 1.25, 1.5, 1.75, 2, 2.5, ..."""
    first, last = math.frexp(least)[1] - 1, math.frexp(largest)[1]
    doublings = last - first
    parts = next((parts for parts in (4, 2, 1) if parts * doublings <= MOST_BINS), 1)
    stride = max(1, math.ceil(doublings / MOST_BINS))
    edges = [
        math.ldexp(1 + part / parts, power)
        for power in range(first, last + stride, stride)
        for part in range(parts)
    ]
    if is_whole:
        edges = [int(edge) for edge in edges if edge == int(edge)]
    start = max(place for place, edge in enumerate(edges) if edge <= least)
    end = min(place for place, edge in enumerate(edges) if edge > largest)
    return edges[start : end + 1]


def _step_edges(least: float, largest: float, *, is_whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    low, high = Decimal(least), Decimal(largest)
    step = _round_step((high - low) / MOST_BINS, is_whole=is_whole)
    start = (low / step).to_integral_value("ROUND_FLOOR")
    edges = []
    for number in count():
        edge = (start + number) * step
        edges.append(int(edge) if is_whole else float(edge))
        if edges[-1] > largest:
            return edges


def _round_step(smallest: Decimal, *, is_whole: bool) -> Decimal:
    if smallest == 0 or (is_whole and smallest <= 1):
        return Decimal(1)
    power = smallest.adjusted()
    return min(
        step
        for step in (Decimal(digit).scaleb(power + more) for more in (0, 1) for digit in STEPS)
        if step >= smallest
    )
