"""Charts of an evaluation: confusion matrix and training curves."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from data_prep.report.html import INK, SERIES_COLORS, chart, svg_chart

MAX_CLASSES_WITH_COUNTS = 25  # with more cells, counts would be unreadable
CELL_COLOR = (0.2, 0.42, 0.82)
RECALL = "_recall@1"
OF_FIRST_NUMBERS = re.compile(r"dim\d+_")  # prefix of metrics of the first numbers of embeddings

# Series name -> (steps, values)
Series = Mapping[str, tuple[Sequence[int], Sequence[float]]]


def confusion_chart(confusion: np.ndarray, class_names: Sequence[str]) -> Markup:
    """Draws a [K, K] confusion matrix, shaded by fractions of its rows, with counts if K is small.

    Args:
        confusion: [K, K] counts; row: true class, column: predicted class.
        class_names: [K] labels of the axes.
    """
    num_classes = len(class_names)
    fractions = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    cells = np.empty((num_classes, num_classes, 4))
    cells[..., :3] = CELL_COLOR
    cells[..., 3] = fractions
    side = 1.6 + 0.38 * min(num_classes, MAX_CLASSES_WITH_COUNTS)
    with chart(width=side, height=side) as figure:
        axes = figure.subplots()
        axes.grid(False)
        axes.set(xlabel="predicted", ylabel="true", aspect="equal")
        if num_classes <= MAX_CLASSES_WITH_COUNTS:
            axes.pcolormesh(cells, edgecolors="#88888833", linewidth=0.5)
            axes.invert_yaxis()
            _write_counts(axes, confusion, fractions)
            centers = np.arange(num_classes) + 0.5
            axes.set_xticks(centers, class_names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(centers, class_names)
            axes.tick_params(length=0)
        else:
            axes.imshow(cells, interpolation="nearest")
    return svg_chart(figure, alt="confusion matrix")


def _write_counts(axes: Axes, confusion: np.ndarray, fractions: np.ndarray) -> None:
    for true, predicted in zip(*np.nonzero(confusion), strict=True):
        axes.text(
            predicted + 0.5,
            true + 0.5,
            f"{round(confusion[true, predicted], 1):.10g}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if fractions[true, predicted] > 0.7 else INK,
        )


def training_charts(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Draws loss, validation recall, learning rate and temperature over the steps of a run.

    Args:
        rows: rows of `pretrain.run.attempts.read_metrics`.
    """
    panels = {
        "loss": _by_stream(rows, "loss"),
        "validation recall@1": _validation_recalls(rows),
        "learning rate": _single(rows, "learning_rate"),
        "logit scale": _by_stream(rows, "logit_scale"),
    }
    panels = {title: series for title, series in panels.items() if series}
    num_rows = (len(panels) + 1) // 2
    with chart(width=10, height=2.7 * num_rows) as figure:
        all_axes = figure.subplots(num_rows, 2, squeeze=False).flatten()
        for axes, (title, series) in zip(all_axes, panels.items(), strict=False):
            _draw_series(axes, title, series)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
    return svg_chart(figure, alt="training curves: " + ", ".join(panels))


def _draw_series(axes: Axes, title: str, series: Series) -> None:
    for index, (name, (steps, values)) in enumerate(series.items()):
        color = SERIES_COLORS[index % len(SERIES_COLORS)]
        marker = "o" if len(steps) < 20 else None
        axes.plot(
            steps, values, label=name, color=color, linewidth=1.4, marker=marker, markersize=3
        )
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.set_xlabel("step")
    if title.startswith("validation recall"):
        axes.set_ylim(0, 1.02)
    if any(series):
        axes.legend(fontsize=8)


def _by_stream(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    series: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for row in rows:
        for stream, value in (row.get(key) or {}).items():
            series[stream][0].append(row["step"])
            series[stream][1].append(value)
    return dict(series)


def _validation_recalls(rows: Sequence[Mapping[str, Any]]) -> Series:
    series: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for row in rows:
        found = [
            (f"{objective}, {metric.removesuffix(RECALL).replace('_', ' ')}{suffix}", value)
            for kind, suffix in (("validation", ""), ("validation_ema", ", EMA"))
            for objective, metrics in row.get(kind, {}).items()
            for metric, value in metrics.items()
            if metric.endswith(RECALL) and not OF_FIRST_NUMBERS.match(metric)
        ]
        for name, value in found:
            series[name][0].append(row["step"])
            series[name][1].append(value)
    return dict(series)


def _single(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    pairs = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    if not pairs:
        return {}
    steps, values = zip(*pairs, strict=True)
    return {"": (steps, values)}
