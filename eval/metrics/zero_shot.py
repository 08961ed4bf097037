"""Zero-shot classification: an item is assigned the class with the nearest class embedding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import (
    Score,
    class_mean_interval,
    mean_score,
    score_without_interval,
)
from eval.metrics.ranking import QueryRanks, chance_ranks, check_finite, cosine_scores

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ClassificationResult:
    """Metrics of one classification; classes are in the order of class_names."""

    scores: dict[str, Score]
    # [K, K] row: true class, column: predicted class; an item whose best classes tie is divided
    # evenly among them
    confusion: np.ndarray
    class_recalls: np.ndarray  # [K]; NaN for classes without items
    predictions: np.ndarray  # [Q] predicted class of each item; -1 if several classes are tied
    ranks: QueryRanks  # rank of the true class of each item
    group_accuracies: dict[str, float]  # group -> top-1 accuracy; empty if there are no groups


@dataclass(frozen=True)
class RankedClasses:
    """Ranks of the true classes, and predicted classes."""

    ranks: QueryRanks  # rank of the true class of each item
    predictions: np.ndarray  # [Q] predicted class; -1 if several classes are tied
    # [K, K] expected counts over random orders of tied classes; int64 if no item has a tie
    confusion: np.ndarray


def classify(
    media_embeddings: Tensor,
    class_embeddings: Tensor,
    *,
    targets: np.ndarray,
    groups: Sequence[str] | None = None,
) -> ClassificationResult:
    """Classifies items by cosine similarity and computes the metrics of `classification_result`.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        class_embeddings: [K, D], L2-normalised.
        targets: [Q] integers from 0 to K - 1.
        groups: [Q] group of each item; adds the metrics of the worst group.

    Raises:
        ValueError: if an embedding is not finite.
    """
    ranked = rank_classes(media_embeddings, class_embeddings, targets=targets)
    return classification_result(ranked, targets=targets, groups=groups)


def classification_result(
    ranked: RankedClasses,
    *,
    targets: np.ndarray,
    groups: Sequence[str] | None = None,
) -> ClassificationResult:
    """Computes top-1 and top-5 accuracy, mean per-class recall, macro F1 and confusion matrix.

    With fewer than 5 classes, top-5 means top-K. Recall and F1 are means over the classes that
    the dataset contains, as in scikit-learn's balanced accuracy and WILDS' F1. The confusion
    matrix holds expected counts if classes tie, and macro F1 is computed from it.

    Args:
        ranked: ranks of the true classes, and predicted classes.
        targets: [Q] integers from 0 to K - 1.
        groups: [Q] group of each item; adds the metrics of the worst group.
    """
    ranks, confusion = ranked.ranks, ranked.confusion
    num_classes = ranks.gallery_size
    chance = chance_ranks(np.ones_like(targets), gallery_size=num_classes)
    hits = ranks.hits_at(1)
    scores = {
        f"top_{k}_accuracy": mean_score(
            ranks.hits_at(k), chance=float(chance.hits_at(k).mean()), are_hits=True
        )
        for k in (1, 5)
    } | {
        "mean_per_class_recall": _mean_per_class_recall(hits, targets, chance=1 / num_classes),
        "macro_f1": _macro_f1(confusion),
    }
    by_group = {}
    if groups is not None:
        by_group = _group_accuracies(hits, groups)
        for k in (1, 5):
            scores[f"worst_group_top_{k}_accuracy"] = _worst_group_accuracy(
                ranks.hits_at(k), chance.hits_at(k), groups
            )
    return ClassificationResult(
        scores=scores,
        confusion=confusion,
        class_recalls=class_recalls(hits, targets, num_classes=num_classes),
        predictions=ranked.predictions,
        ranks=ranks,
        group_accuracies=by_group,
    )


def rank_classes(
    media_embeddings: Tensor, class_embeddings: Tensor, *, targets: np.ndarray
) -> RankedClasses:
    """Ranks the true class of each item among all classes, and predicts its class.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        class_embeddings: [K, D], L2-normalised.
        targets: [Q] integers from 0 to K - 1.

    Raises:
        ValueError: if an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(class_embeddings, name="class_embeddings")
    rows = media_embeddings.split(ROWS_AT_ONCE)
    return rank_scores((cosine_scores(each, class_embeddings) for each in rows), targets=targets)


def rank_scores(score_rows: Iterable[Tensor], *, targets: np.ndarray) -> RankedClasses:
    """Ranks the true class of each item, as `rank_classes` does, from given scores.

    Args:
        score_rows: yields the scores of consecutive items, [rows, K]; they are overwritten.
        targets: [Q] integers from 0 to K - 1.
    """
    above, tied, predictions, start, confusion = [], [], [], 0, np.zeros((0, 0))
    for scores in score_rows:
        num_rows, num_classes = scores.shape
        own = torch.as_tensor(targets[start : start + num_rows], device=scores.device)[:, None]
        is_best = scores == scores.amax(dim=-1, keepdim=True)
        num_best = is_best.sum(dim=-1)
        predictions.append(torch.where(num_best == 1, scores.argmax(dim=-1), -1))
        if not start:
            confusion = np.zeros((num_classes, num_classes))
        item, predicted = is_best.nonzero().cpu().numpy().T
        fractions = 1 / num_best.cpu().numpy()[item]
        np.add.at(confusion, (targets[start : start + num_rows][item], predicted), fractions)
        start += num_rows
        of_target = scores.gather(-1, own)  # [rows, 1]
        scores.scatter_(-1, own, -torch.inf)  # the true class does not compete with itself
        above.append((scores > of_target).sum(dim=-1))
        tied.append((scores == of_target).sum(dim=-1))
    ranks = QueryRanks(
        num_above=torch.cat(above).cpu().numpy(),
        num_tied=torch.cat(tied).cpu().numpy(),
        num_tied_relevant=np.ones(len(targets), dtype=np.int64),
        gallery_size=len(confusion),
    )
    found = torch.cat(predictions).cpu().numpy()
    if (found >= 0).all():
        confusion = confusion.astype(np.int64)
    return RankedClasses(ranks, found, confusion)


def class_recalls(hits: np.ndarray, targets: np.ndarray, *, num_classes: int) -> np.ndarray:
    """Computes the recall of each class, [K]; NaN for classes without items."""
    sizes = np.bincount(targets, minlength=num_classes)
    num_hits = np.bincount(targets, weights=hits, minlength=num_classes)
    return np.divide(num_hits, sizes, out=np.full(num_classes, np.nan), where=sizes > 0)


def _mean_per_class_recall(hits: np.ndarray, targets: np.ndarray, *, chance: float) -> Score:
    """Averages over the classes with items (scikit-learn's balanced accuracy)."""
    present, positions = np.unique(targets, return_inverse=True)
    sizes = np.bincount(positions)
    recalls = class_recalls(hits, positions, num_classes=len(present))
    low, high, method = class_mean_interval(recalls, class_sizes=sizes)
    return Score(float(recalls.mean()), low, high, chance, len(hits), method)


def macro_f1(confusion: np.ndarray) -> np.ndarray:
    """Computes the mean of 2 TP / (2 TP + FP + FN) over the classes with items.

    Args:
        confusion: [..., K, K] counts or expected counts; row: true class, column: predicted class.

    Returns:
        [...] float64.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, predicted = confusion.sum(axis=-1), confusion.sum(axis=-2)
    f1 = 2 * right / np.maximum(true + predicted, 1)
    return (f1 * (true > 0)).sum(axis=-1) / np.maximum((true > 0).sum(axis=-1), 1)


def _macro_f1(confusion: np.ndarray) -> Score:
    """Computes macro F1 without an interval.

    Resampled classes of few items lose their hits more often than they gain any, so a bootstrap
    is biased: with 397 classes of 10 items, it covered the truth in 10 % of experiments.
    """
    num_items, num_classes = round(confusion.sum()), len(confusion)
    # A random guess assigns 1 / K of all items, and 1 / K of each class, to every class.
    sizes = confusion.sum(axis=1)
    precisions = sizes[sizes > 0] / num_items
    chance = (2 * precisions / (1 + precisions * num_classes)).mean()
    return score_without_interval(macro_f1(confusion), chance, num_items, reason="biased")


def _group_accuracies(hits: np.ndarray, groups: Sequence[str]) -> dict[str, float]:
    names, indices = np.unique(np.asarray(groups), return_inverse=True)
    means = np.bincount(indices, weights=hits) / np.bincount(indices)
    return dict(zip(names.tolist(), means.tolist(), strict=True))


def _worst_group_accuracy(
    hits: np.ndarray, chance_hits: np.ndarray, groups: Sequence[str]
) -> Score:
    """Computes the lowest accuracy of any group.

    It has no interval: the lowest of several estimates lies below the lowest true accuracy.
    """
    by_group = _group_accuracies(hits, groups)
    sizes = Counter(groups)
    worst = min(by_group, key=lambda group: (by_group[group], sizes[group], group))
    return score_without_interval(
        by_group[worst], chance_hits.mean(), sizes[worst], reason=f"lowest group, {worst}"
    )
