"""Outcomes to files: results.json with full provenance, a table for people in results.md, and one
for programs in results.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import (
    InputError,
    RunError,
)
from data_prep.storage.atomic import write_atomically
from eval.config import EvaluateConfig
from eval.metrics.intervals import CONFIDENCE, Score
from eval.models.encoder import Encoder
from eval.models.loaded_model import ModelOrigin
from eval.report.averages import averages_of
from eval.report.markdown_table import markdown_table
from eval.report.records import outcome_record
from eval.tasks.runner import Outcome
from eval.tasks.task import RetrievalTask
from pretrain.run.folder import describe_environment

COLUMNS = ("evaluation", "metric", "value", "95 % interval", "chance", "n")


def results_record(
    config: EvaluateConfig,
    outcomes: Sequence[Outcome],
    *,
    encoder: Encoder,
    skipped: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:
    """What results.json holds: the metrics, and everything they are a function of.

    Args:
        config: the evaluation's config.
        outcomes: of its tasks.
        encoder: that made the embeddings.
        skipped: evaluation -> why it was left out.
        seconds: of the whole evaluation.
    """
    return {
        "checkpoint": _model_record(encoder.origin),
        "evaluations": {each.task.name: outcome_record(each) for each in outcomes},
        "averages": {
            name: asdict(score) for name, score in averages_of(outcomes, config.evaluations).items()
        },
        "skipped": dict(skipped),
        "method": {
            "tower_dtype": str(encoder.dtype).removeprefix("torch."),
            "long_clips": config.long_clips,
            "embedding_dtype": "float32",
            "score_dtype": "float64 products rounded to float32",
            "tf32": False,
            "ties": "broken at chance",
            "confidence": CONFIDENCE,
            "bootstrap_samples": config.bootstrap_samples,
            "seed": config.seed,
        },
        "environment": {"device": device_name(encoder)} | describe_environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "config": json.loads(config.model_dump_json()),
    }


def device_name(encoder: Encoder) -> str:
    """What encoded: "cpu", or the name of the GPU."""
    if encoder.device.type == "cuda":
        return torch.cuda.get_device_name(encoder.device)
    return encoder.device.type


def _model_record(origin: ModelOrigin) -> dict[str, Any]:
    return {
        "library": origin.library,
        "folder": str(origin.folder),
        "step": origin.step,
        "marks": list(origin.tags),
        "model_sha256": origin.sha256,
    }


def scores_table(outcomes: Sequence[Outcome], record: Mapping[str, Any]) -> str:
    """The metrics and averages of all evaluations as a Markdown table with aligned columns.

    Args:
        outcomes: of the evaluations.
        record: see `results_record`.
    """
    rows = [(name, *cells) for name, cells in _table_rows(outcomes)]
    for name, values in record["averages"].items():
        rows.append((f"average: {name}", "main metrics", *score_cells("", Score(**values))))
    table = markdown_table(COLUMNS, rows)
    notes = [
        f"\n{outcome.task.name}: {note}"
        for outcome in outcomes
        if isinstance(outcome.task, RetrievalTask)
        and (note := repeated_captions_note(outcome.task))
    ]
    notes += [f"\n{name} left out: {reason}" for name, reason in record["skipped"].items()]
    return "\n".join([table, *notes]) + "\n"


def repeated_captions_note(task: RetrievalTask) -> str:
    """What a reader must know of captions that stand at several items; empty if none does."""
    num_repeated = len(task.captions) - len(set(task.captions))
    if not num_repeated:
        return ""
    if task.merges_equal_captions:
        return (
            f"{num_repeated} captions repeat the words of another one: each is right for all items "
            "with a caption of its words (equal_captions: merged); metrics of the literature count "
            "its own item alone."
        )
    return (
        f"{num_repeated} captions repeat the words of another one: each is right only for its own "
        "item, which bounds the recall that any model can reach."
    )


def _table_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (outcome.task.name, (metric, *score_cells(metric, score)))
        for outcome in outcomes
        for metric, score in outcome.result.scores.items()
    ]


def is_rank(metric: str) -> bool:
    """Whether a metric counts places, best 1, rather than being a share of queries."""
    return metric.endswith("_rank")


def score_cells(metric: str, score: Score) -> tuple[str, str, str, str]:
    """(value, interval, chance, number of queries) as text."""
    show = _rank_text if is_rank(metric) else _percent_text
    interval = f"{show(score.low)} to {show(score.high)}"
    return show(score.value), interval, show(score.chance), str(score.num_queries)


def _percent_text(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else f"{100 * share:.2g} %"


def _rank_text(rank: float) -> str:
    return f"{rank:.0f}" if rank == round(rank) else f"{rank:.1f}"


def scores_csv(outcomes: Sequence[Outcome]) -> str:
    """The metrics of all evaluations, a row each, for programs."""
    text = io.StringIO()
    names = [field.name for field in fields(Score)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["evaluation", "metric", *names])
    for outcome in outcomes:
        for metric, score in outcome.result.scores.items():
            writer.writerow([outcome.task.name, metric, *asdict(score).values()])
    return text.getvalue()


def refuse_missed_goals(config: EvaluateConfig, outcomes: Sequence[Outcome]) -> None:
    """
    Raises:
        InputError: a goal is of a metric that there is not.
        RunError: a metric is below its goal, or a rank above it; all are named.
    """
    missed = []
    for outcome in outcomes:
        name, scores = outcome.task.name, outcome.result.scores
        for metric, goal in config.evaluations[name].goals.items():
            if metric not in scores:
                raise InputError(
                    f"evaluations.{name}.goals: expected one of {', '.join(scores)}; found {metric}"
                )
            value = scores[metric].value
            if value > goal if is_rank(metric) else value < goal:
                missed.append(f"  {name}: {metric} is {value:.4g}, the goal {goal:g}")
    if missed:
        raise RunError("goals are missed:\n" + "\n".join(missed))


def write_results(folder: Path, record: dict[str, Any], *, table: str, rows: str) -> None:
    """Writes results.json, results.md and results.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.csv", rows.encode())
    write_atomically(folder / "results.json", json.dumps(record, indent=2).encode() + b"\n")
    write_atomically(folder / "results.md", table.encode())
