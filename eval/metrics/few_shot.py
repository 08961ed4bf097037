"""Few-shot classification: linear probes fitted to a few items per class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.metrics.intervals import Score, mean_score
from eval.metrics.linear_probe import fit_probe, with_ones
from eval.metrics.zero_shot import rank_classes


@dataclass(frozen=True)
class FewShotResult:
    """Metrics of few-shot probes."""

    scores: dict[str, Score]
    hits: dict[int, np.ndarray]  # shots -> [Q] fraction of draws in which the item is correct


def classify_from_few(
    media_embeddings: Tensor,
    train: tuple[Tensor, Tensor],
    *,
    targets: np.ndarray,
    num_classes: int,
    shots: Sequence[int],
    num_draws: int,
    l2: float,
    seed: int,
) -> FewShotResult:
    """Computes top-1 accuracy for each number of shots, averaged over several draws.

    The interval is for the drawn training items.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        train: [n, D] embeddings and [n] classes; at least max(shots) items per class.
        targets: [Q] integers from 0 to K - 1.
        num_classes: K.
        shots: numbers of training items per class; within a draw, smaller training sets are
            subsets of larger ones.
        num_draws: number of random draws of the training items.
        l2: weight of the penalty (see eval.metrics.linear_probe).
        seed: seed of the draws of training items.
    """
    embeddings, classes = train
    orders = [
        _order_within_classes(classes.cpu().numpy(), np.random.default_rng((seed, draw)))
        for draw in range(num_draws)
    ]
    scores, all_hits = {}, {}
    for number in shots:
        hits = np.zeros(len(targets))
        for order in orders:
            chosen = torch.from_numpy(np.flatnonzero(order < number)).to(classes.device)
            probe = fit_probe(embeddings[chosen], classes[chosen], num_classes=num_classes, l2=l2)
            ranked = rank_classes(
                with_ones(media_embeddings), probe.as_class_embeddings(), targets=targets
            )
            hits += ranked.ranks.hits_at(1) / num_draws
        scores[f"top_1_accuracy@{number}_shot"] = mean_score(hits, chance=1 / num_classes)
        all_hits[number] = hits
    return FewShotResult(scores, all_hits)


def _order_within_classes(classes: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Draws a random order and returns each item's index within its class, int64 [n]."""
    order = generator.permutation(len(classes))
    by_class = order[np.argsort(classes[order], kind="stable")]
    sizes = np.bincount(classes)
    firsts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    indices = np.empty(len(classes), dtype=np.int64)
    indices[by_class] = np.arange(len(classes)) - firsts
    return indices
