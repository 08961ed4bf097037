"""Averages of the main metrics of several evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import InputError
from eval.metrics.intervals import (
    Score,
    class_mean_interval,
    score_without_interval,
    trials_of_interval,
)

if TYPE_CHECKING:
    from eval.tasks.task import EvaluationSection, Outcome

ALL = "all"


def main_metric_of(outcome: Outcome, section: EvaluationSection) -> str | None:
    """Returns the metric that an evaluation contributes to averages; None if it has none.

    Raises:
        InputError: if the evaluation does not have the `main_metric` of its config.
    """
    scores = outcome.scores
    if section.main_metric is None:
        return outcome.task.main_metric(scores)
    if section.main_metric not in scores:
        raise InputError(
            f"evaluations.{outcome.task.name}.main_metric: expected one of {', '.join(scores)}; "
            f"found {section.main_metric}"
        )
    return section.main_metric


def averages_of(
    outcomes: Sequence[Outcome], evaluations: Mapping[str, EvaluationSection]
) -> dict[str, Score]:
    """Computes the mean main metric over all evaluations, and over the members of each average.

    The intervals treat evaluations as independent, like classes of as many items as they have in
    effect.

    Args:
        outcomes: outcomes of the evaluations.
        evaluations: evaluation name -> config section.

    Raises:
        InputError: see `main_metric_of`.
    """
    members: dict[str, list[Score]] = {ALL: []}
    for outcome in outcomes:
        section = evaluations[outcome.task.name]
        metric = main_metric_of(outcome, section)
        if metric is None:
            continue
        for name in (ALL, *section.averages):
            members.setdefault(name, []).append(outcome.scores[metric])
    return {name: mean_of_scores(scores) for name, scores in members.items() if len(scores) > 1}


def mean_of_scores(scores: Sequence[Score]) -> Score:
    """Averages the scores of independent evaluations; see `averages_of`."""
    value, chance = (
        float(np.mean([getattr(s, key) for s in scores])) for key in ("value", "chance")
    )
    if any(s.low is None or s.high is None for s in scores):
        return score_without_interval(
            value, chance, len(scores), reason="an evaluation has no interval"
        )
    low, high, method = class_mean_interval(
        np.array([score.value for score in scores]),
        class_sizes=np.array([trials_of_interval(s.value, s.low, s.high) for s in scores]),
    )
    return Score(value, low, high, chance, len(scores), method)
