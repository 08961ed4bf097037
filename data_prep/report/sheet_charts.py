"""Charts of a data sheet: histograms of numbers, and bar tables for a few distinct values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from data_prep.report.html import (
    SERIES_COLORS,
    breakable,
    chart,
    fraction_bar,
    heading,
    narrow,
    paragraph,
    svg_chart,
    table,
)
from data_prep.report.numbers import number_text, percent_text, value_text
from data_prep.report.value_counts import Histogram, Measure, ValueCounts

MAX_LISTED = 12
MAX_DIGITS = 17  # identify any floating-point number
MAX_DECADES_WITH_FRACTIONS = 2.5


def measure_block(measure: Measure, counts: ValueCounts, *, whole: int) -> Markup:
    """Builds a block with the title, range and histogram or values of a measure.

    Args:
        measure: measure to show.
        counts: counts of its values.
        whole: number of values including missing ones.
    """
    parts = [heading(measure.title)]
    if counts.num_distinct == 1:
        value = value_text(counts.most_frequent[0][0], measure.unit)
        parts.append(paragraph(f"{value} for all"))
    elif counts.spread and counts.spread.histogram:
        parts.append(paragraph(spread_text(counts, measure.unit)))
        parts.append(histogram_chart(counts.spread.histogram, measure))
    else:
        rows = sorted(counts.most_frequent)
        labels = [(value_text(value, measure.unit), num) for value, num in rows]
        parts.append(count_table(labels, "value", whole=counts.num_filled))
    if counts.num_filled < whole:
        missing = whole - counts.num_filled
        parts.append(paragraph(f"missing: {missing:,} ({percent_text(missing, whole)})"))
    return Markup("").join(parts)


def spread_text(counts: ValueCounts, unit: str) -> str:
    """Describes the range and quantiles of numbers."""
    spread = counts.spread
    assert spread is not None
    # Each number of bytes has its own unit (kB, MB); other units appear once.
    unit_of_each = unit if unit == "bytes" else ""
    values = (spread.minimum, spread.maximum, *spread.quantiles)
    least, largest, low, median, high = (value_text(value, unit_of_each) for value in values)
    unit_of_all = "" if unit_of_each else f" {unit}".rstrip()
    return f"{least} to {largest}{unit_of_all}; median {median}; 90 % from {low} to {high}"


def histogram_chart(histogram: Histogram, measure: Measure) -> Markup:
    """Draws a histogram, with a logarithmic axis if the bins are logarithmic."""
    edges = np.array(histogram.edges, dtype=np.float64)
    widths = np.diff(edges)
    with chart(width=5.2, height=1.9) as figure:
        axes = figure.subplots()
        axes.bar(
            edges[:-1], histogram.counts, width=0.92 * widths, align="edge", color=SERIES_COLORS[0]
        )
        axes.set_xlim(edges[0], edges[-1])
        if histogram.is_logarithmic:
            _set_log_ticks(axes, num_decades=np.log10(edges[-1] / edges[0]))
        axes.grid(False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda value, _: short_number(value, digits_for(axes.get_xticks())))
        )
        axes.set_xlabel(measure.unit)
    largest = int(np.argmax(histogram.counts))
    low, high = (value_text(edge, measure.unit) for edge in edges[largest : largest + 2].tolist())
    bars = svg_chart(figure, alt=f"histogram, highest from {low} to {high}")
    return narrow(bars)


def _set_log_ticks(axes: Axes, *, num_decades: float) -> None:
    axes.set_xscale("log")
    fractions = (1.0, 2.0, 5.0) if num_decades < MAX_DECADES_WITH_FRACTIONS else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=fractions, numticks=10))
    axes.xaxis.set_minor_locator(NullLocator())


def short_number(value: float, digits: int = 4) -> str:
    """Formats a number for an axis: 1500 as 1.5k, 2000000 as 2M."""
    rounded = float(f"{value:.{digits}g}")
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(rounded) >= factor:
            return f"{rounded / factor:.{digits}g}{suffix}"
    return f"{rounded:.{digits}g}"


def digits_for(ticks: Sequence[float]) -> int:
    """Returns the number of digits, at least 4, with which the labels of an axis differ."""
    for digits in range(4, MAX_DIGITS):
        if len({short_number(tick, digits) for tick in ticks}) == len(set(ticks)):
            return digits
    return MAX_DIGITS


def value_table(counts: ValueCounts, name: str, *, max_listed: int = MAX_LISTED) -> Markup:
    """Builds a table of the most frequent values, with bars for their fractions.

    Args:
        counts: counts of values of any type.
        name: header of the column of values.
        max_listed: limit on the number of rows.
    """
    rows = [(value_text(value), num) for value, num in counts.most_frequent[:max_listed]]
    listed = sum(num for _, num in rows)
    if counts.num_distinct > len(rows):
        others = counts.num_distinct - len(rows)
        rows.append((f"{number_text(others)} others", counts.num_filled - listed))
    return count_table(rows, name, whole=counts.num_filled)


def count_table(rows: Sequence[tuple[Any, int]], name: str, *, whole: int) -> Markup:
    """Builds a table of names with counts, bars and fractions of the whole."""
    cells = [
        (
            breakable(label),
            fraction_bar(num / whole if whole else 0),
            f"{num:,}",
            percent_text(num, whole),
        )
        for label, num in rows
    ]
    return table((name, "", "number", "fraction"), cells, numeric={2, 3})
