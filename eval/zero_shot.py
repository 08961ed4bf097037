"""Zero-shot classification: the class of a media item is the class embedding nearest to it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.intervals import Bootstrap, Score, class_mean_interval, wilson_interval
from eval.ranking import QueryRanks, chance_ranks, check_finite, cosine_scores

ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ClassificationResult:
    """The figures of one zero-shot classification; classes are in the order of class_names."""

    scores: dict[str, Score]
    confusion: np.ndarray  # [K, K] int64: row true class, column predicted class
    class_recalls: np.ndarray  # [K]; NaN where the dataset has no item of the class
    predictions: np.ndarray  # [Q]
    ranks: QueryRanks  # of the true class of each item


def classify(
    media_embeddings: Tensor, class_embeddings: Tensor, *, targets: np.ndarray, bootstrap: Bootstrap
) -> ClassificationResult:
    """Top-1 and top-5 accuracy, mean per class recall and confusion matrix.

    With fewer than 5 classes, top-5 counts as top-K.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        class_embeddings: [K, D], L2-normalised.
        targets: [Q] integers from 0 to K - 1.
        bootstrap: of the interval of mean per class recall.

    Raises:
        ValueError: an embedding is not finite.
    """
    num_classes = len(class_embeddings)
    ranks, predictions = rank_classes(media_embeddings, class_embeddings, targets=targets)
    chance = chance_ranks(np.ones_like(targets), gallery_size=num_classes)
    hits = ranks.hits_at(1)
    return ClassificationResult(
        scores={
            "top_1_accuracy": _accuracy(hits, chance.hits_at(1)),
            "top_5_accuracy": _accuracy(ranks.hits_at(5), chance.hits_at(5)),
            "mean_per_class_recall": _mean_per_class_recall(
                hits, targets, chance=1 / num_classes, bootstrap=bootstrap
            ),
        },
        confusion=confusion_matrix(targets, predictions, num_classes=num_classes),
        class_recalls=class_recalls(hits, targets, num_classes=num_classes),
        predictions=predictions,
        ranks=ranks,
    )


def rank_classes(
    media_embeddings: Tensor, class_embeddings: Tensor, *, targets: np.ndarray
) -> tuple[QueryRanks, np.ndarray]:
    """Where the true class of each item stands among all classes, and the class predicted.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        class_embeddings: [K, D], L2-normalised.
        targets: [Q] integers from 0 to K - 1.

    Returns:
        The ranks, and [Q] int64 predictions (of classes that tie, the first).

    Raises:
        ValueError: an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(class_embeddings, name="class_embeddings")
    above, level, predictions = [], [], []
    all_targets = torch.as_tensor(targets, device=media_embeddings.device)[:, None]  # [Q, 1]
    for rows, target in zip(
        media_embeddings.split(ROWS_AT_ONCE), all_targets.split(ROWS_AT_ONCE), strict=True
    ):
        scores = cosine_scores(rows, class_embeddings)  # [rows, K]
        predictions.append(scores.argmax(dim=-1))
        of_target = scores.gather(-1, target)  # [rows, 1]
        scores.scatter_(-1, target, -torch.inf)  # the true class does not meet itself
        above.append((scores > of_target).sum(dim=-1))
        level.append((scores == of_target).sum(dim=-1))
    ranks = QueryRanks(
        num_above=torch.cat(above).cpu().numpy(),
        num_level=torch.cat(level).cpu().numpy(),
        num_right_level=np.ones(len(targets), dtype=np.int64),
        gallery_size=len(class_embeddings),
    )
    return ranks, torch.cat(predictions).cpu().numpy()


def confusion_matrix(
    targets: np.ndarray, predictions: np.ndarray, *, num_classes: int
) -> np.ndarray:
    """[K, K] counts: row true class, column predicted class."""
    cells = np.bincount(targets * num_classes + predictions, minlength=num_classes**2)
    return cells.reshape(num_classes, num_classes)


def class_recalls(hits: np.ndarray, targets: np.ndarray, *, num_classes: int) -> np.ndarray:
    """[K] share of each class's items that are hits; NaN for a class without items."""
    sizes = np.bincount(targets, minlength=num_classes)
    num_hits = np.bincount(targets, weights=hits, minlength=num_classes)
    return np.divide(num_hits, sizes, out=np.full(num_classes, np.nan), where=sizes > 0)


def _accuracy(hits: np.ndarray, chance_hits: np.ndarray) -> Score:
    low, high = wilson_interval(float(hits.sum()), len(hits))
    return Score(float(hits.mean()), low, high, float(chance_hits.mean()), len(hits), "Wilson")


def _mean_per_class_recall(
    hits: np.ndarray, targets: np.ndarray, *, chance: float, bootstrap: Bootstrap
) -> Score:
    """Over the classes that the dataset holds, as scikit-learn's balanced accuracy."""
    present, positions = np.unique(targets, return_inverse=True)
    sizes = np.bincount(positions)
    recalls = class_recalls(hits, positions, num_classes=len(present))
    low, high, method = class_mean_interval(recalls, class_sizes=sizes, bootstrap=bootstrap)
    return Score(float(recalls.mean()), low, high, chance, len(hits), method)
