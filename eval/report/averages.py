"""Averages over the evaluations of a suite: of each, one metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data_prep.errors import InputError
from eval.config import EvaluationSection
from eval.metrics.intervals import Score
from eval.tasks.runner import Outcome

# Of a task, where the evaluation names none; the first that the result has.
MAIN_METRICS = (
    "top_1_accuracy",
    "mean_average_precision",
    "mean_recall@1",
    "caption_accuracy",
    "group_score",
    "jaccard",
)
ALL = "all"


def main_metric_of(outcome: Outcome, section: EvaluationSection) -> str | None:
    """The metric of an evaluation that averages take; None if it has none that is a share.

    Raises:
        InputError: the evaluation has no metric of the name that its config gives.
    """
    scores = outcome.result.scores
    if section.main_metric is None:
        few_shot = [name for name in scores if name.endswith("_shot")]
        return next((name for name in MAIN_METRICS if name in scores), (few_shot or [None])[-1])
    if section.main_metric not in scores:
        raise InputError(
            f"evaluations.{outcome.task.name}.main_metric: expected one of {', '.join(scores)}; "
            f"found {section.main_metric}"
        )
    return section.main_metric


def averages_of(
    outcomes: Sequence[Outcome], sections: Mapping[str, EvaluationSection]
) -> dict[str, Score]:
    """The mean of the main metrics of all evaluations, and of those of each average they name.

    The interval takes the evaluations for independent of one another: their half-widths add up as
    squares.

    Args:
        outcomes: of the evaluations.
        sections: of their config, by name.

    Raises:
        InputError: see `main_metric_of`.
    """
    members: dict[str, list[Score]] = {ALL: []}
    for outcome in outcomes:
        section = sections[outcome.task.name]
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
