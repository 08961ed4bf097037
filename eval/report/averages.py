"""Averages over the evaluations of a suite, of one metric each."""

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
    """Returns the metric of an evaluation that averages take; None if it has none.

    Raises:
        InputError: if the evaluation lacks the metric that its config names.
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
    """Computes the mean of the main metrics of all evaluations, and of each average they name.

    The intervals treat the evaluations as independent: their half-widths add up as squares.

    Args:
        outcomes: outcomes of the evaluations.
        evaluations: sections of their config, by name.

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
    below = np.linalg.norm([s.value - s.low for s in scores]) / len(scores)
    above = np.linalg.norm([s.high - s.value for s in scores]) / len(scores)
    return Score(
        value, value - float(below), value + float(above), chance, len(scores), "of its parts"
    )
