"""Report section of a single-label classification: confusions, recalls and example items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from data_prep.report.html import columns, heading, interval_bar, table
from eval.embeddings.items import ItemSet
from eval.metrics.intervals import hits_interval
from eval.report.charts import confusion_chart
from eval.report.gallery import ItemViews, card, cards, shown_queries

if TYPE_CHECKING:
    from eval.metrics.zero_shot import ClassificationResult

MAX_CLASSIFIED_ITEMS = 10
MAX_CLASS_ROWS = 60
MAX_CONFUSIONS = 10


def class_blocks(
    items: ItemSet,
    result: ClassificationResult,
    *,
    class_labels: Sequence[str],
    targets: np.ndarray,
    groups: Sequence[str] | None = None,
) -> list[Markup]:
    """Builds the confusion matrix, most frequent confusions, class recalls and example items.

    Args:
        items: Q items.
        result: result of their classification.
        class_labels: [K] unique names of the classes.
        targets: [Q] index of each item's class.
        groups: [Q] group of each item; adds a table of accuracies per group.
    """
    matrix = [
        heading("Confusion matrix"),
        confusion_chart(result.confusion, class_labels),
        heading("Most frequent confusions"),
        _confusion_table(result.confusion, class_labels),
    ]
    classes = [heading("Recall per class, worst first"), _class_table(result, class_labels)]
    if groups is not None:
        classes += [
            heading("Accuracy per group, worst first"),
            _group_table(groups, result.group_accuracies),
        ]
    return [
        columns([Markup("").join(matrix), Markup("").join(classes)]),
        heading("Example items, mistakes first"),
        _classified_items(items, class_labels, targets, result.predictions),
    ]


def _class_table(result: ClassificationResult, class_labels: Sequence[str]) -> Markup:
    sizes = np.rint(result.confusion.sum(axis=1)).astype(np.int64)  # exact counts despite ties
    present = np.flatnonzero(sizes)
    worst_first = present[np.argsort(result.class_recalls[present], kind="stable")]
    rows = [
        (
            class_labels[index],
            _recall_bar(result.class_recalls[index], int(sizes[index]), len(class_labels)),
            f"{100 * result.class_recalls[index]:.1f} %",
            str(sizes[index]),
        )
        for index in worst_first[:MAX_CLASS_ROWS].tolist()
    ]
    return table(("class", "", "recall", "n"), rows, numeric={2, 3})


def _recall_bar(recall: float, num_items: int, num_classes: int) -> Markup:
    """Draws the recall of a class with its interval, if it has one, and chance level."""
    low, high, _ = hits_interval(recall * num_items, num_items)
    return interval_bar(recall, low=low, high=high, reference=1 / num_classes)


def _group_table(groups: Sequence[str], group_accuracies: Mapping[str, float]) -> Markup:
    worst_first = sorted(group_accuracies, key=group_accuracies.get)
    rows = [
        (name, f"{100 * group_accuracies[name]:.1f} %", str(groups.count(name)))
        for name in worst_first[:MAX_CLASS_ROWS]
    ]
    return table(("group", "top-1 accuracy", "n"), rows, numeric={1, 2})


def _confusion_table(confusion: np.ndarray, class_labels: Sequence[str]) -> Markup:
    wrong = np.where(np.eye(len(confusion), dtype=bool), 0, confusion)
    commonest = np.argsort(-wrong, axis=None, kind="stable")[:MAX_CONFUSIONS]
    rows = []
    for true, predicted in zip(*np.unravel_index(commonest, wrong.shape), strict=True):
        if wrong[true, predicted]:
            fraction = wrong[true, predicted] / confusion[true].sum()
            cells = (
                class_labels[true],
                class_labels[predicted],
                f"{round(wrong[true, predicted], 1):.10g}",
            )
            rows.append((*cells, f"{100 * fraction:.1f} %"))
    header = ("true class", "predicted as", "items", "fraction of the class")
    return table(header, rows, numeric={2, 3})


def _classified_items(
    items: ItemSet,
    class_labels: Sequence[str],
    targets: np.ndarray,
    predictions: np.ndarray,
) -> Markup:
    """Builds cards of items with their true class, and the predicted class if it differs."""
    views = ItemViews(items)
    is_wrong = predictions != targets
    shown = []
    for item in shown_queries(1.0 + is_wrong, num_queries=MAX_CLASSIFIED_ITEMS):
        true, predicted = class_labels[targets[item]], predictions[item]
        as_class = class_labels[predicted] if predicted >= 0 else "several classes (tied)"
        label = f"{true}, predicted as {as_class}" if is_wrong[item] else true
        shown.append(card(views.of(item), label, kind="missed" if is_wrong[item] else "good"))
    return cards(shown)
