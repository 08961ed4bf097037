"""Averages of the main metrics of several evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from data_prep.errors import InputError
from eval.metrics.intervals import Score

if TYPE_CHECKING:
    from eval.tasks.task import EvaluationSection, Outcome

ALL = "all"


def main_metric_of(outcome: Outcome, section: EvaluationSection) -> str | None:
    """Returns the metric that an evaluation contributes to averages; None if it has none.

    Raises:
        InputError: if the evaluation does not have the `main_metric` of its config.
    """
    scores = outcome.result.scores
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

    The intervals treat evaluations as independent: their half-widths add in quadrature.

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
            members.setdefault(name, []).append(outcome.result.scores[metric])
    return {name: _mean(scores) for name, scores in members.items() if len(scores) > 1}


def _mean(scores: Sequence[Score]) -> Score:
    value, chance = (
        float(np.mean([getattr(s, key) for s in scores])) for key in ("value", "chance")
    )
    if any(s.low is None or s.high is None for s in scores):
        return Score(value, None, None, chance, len(scores), "none: a part has no interval")
    below = np.linalg.norm([s.value - s.low for s in scores]) / len(scores)
    above = np.linalg.norm([s.high - s.value for s in scores]) / len(scores)
    return Score(
        value, value - float(below), value + float(above), chance, len(scores), "of its parts"
    )
