"""Results files: results.json with full provenance, results.md to read, results.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from data_prep.errors import InputError, RunError
from data_prep.storage.atomic import write_atomically
from eval.metrics.intervals import CONFIDENCE, Bootstrap, Score
from eval.models.encoder import Encoder
from eval.models.loaded_model import ModelOrigin
from eval.report.markdown_table import markdown_table
from pretrain.run.folder import describe_environment

if TYPE_CHECKING:
    from eval.tasks.task import EvaluationSection, Outcome

COLUMNS = ("evaluation", "metric", "value", "95 % interval", "chance", "n")


def results_record(
    outcomes: Sequence[Outcome],
    *,
    averages: Mapping[str, Score],
    encoder: Encoder,
    long_clips: str,
    bootstrap: Bootstrap,
    skipped: Mapping[str, str],
    seconds: float,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the content of results.json: the metrics, and everything they depend on.

    Args:
        outcomes: outcomes of all evaluations.
        averages: averages over the evaluations, by name.
        encoder: encoder that computed the embeddings.
        long_clips: see `EncodingConfig.long_clips`.
        bootstrap: settings of the intervals.
        skipped: skipped evaluation -> reason.
        seconds: duration of the whole evaluation.
        config: resolved config as JSON values.
    """
    return {
        "checkpoint": _model_record(encoder.origin),
        "evaluations": {each.task.name: outcome_record(each) for each in outcomes},
        "averages": {name: asdict(score) for name, score in averages.items()},
        "skipped": dict(skipped),
        "method": _method_record(encoder, long_clips, bootstrap),
        "environment": {"device": device_name(encoder)} | describe_environment(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 2),
        "config": dict(config),
    }


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """Returns the entry of one evaluation in results.json."""
    task = outcome.task
    return {
        "dataset": {
            "folder": str(task.dataset.folder),
            "media": task.dataset.info.media,
            "num_samples": len(task.dataset),
            "fingerprint": task.dataset.fingerprint,
        },
        "scores": {name: asdict(score) for name, score in outcome.scores.items()},
        "task": task.task_name,
        **task.record_of_items(),
        **task.record(outcome),
        **outcome.counts,
        **({} if outcome.space is None else {"embedding_space": outcome.space.record()}),
        "seconds": round(outcome.seconds, 2),
    }


def _method_record(encoder: Encoder, long_clips: str, bootstrap: Bootstrap) -> dict[str, Any]:
    return {
        "tower_dtype": str(encoder.dtype).removeprefix("torch."),
        "long_clips": long_clips,
        "embedding_dtype": "float32",
        "score_dtype": "float64 products rounded to float32",
        "tf32": False,
        "ties": "expectation over random orders",
        "confidence": CONFIDENCE,
        "bootstrap_samples": bootstrap.num_samples,
        "seed": bootstrap.seed,
    }


def device_name(encoder: Encoder) -> str:
    """Returns "cpu", or the name of the encoder's GPU."""
    if encoder.device.type == "cuda":
        return torch.cuda.get_device_name(encoder.device)
    return encoder.device.type


def _model_record(origin: ModelOrigin) -> dict[str, Any]:
    return {
        "library": origin.library,
        "folder": str(origin.folder),
        "step": origin.step,
        "weights": origin.weights,
        "marks": list(origin.tags),
        "model_sha256": origin.sha256,
        "settings": dict(origin.settings),
    }


def scores_table(outcomes: Sequence[Outcome], record: Mapping[str, Any]) -> str:
    """Formats the metrics and averages of all evaluations as a Markdown table.

    Args:
        outcomes: outcomes of all evaluations.
        record: see `results_record`.
    """
    rows = [(name, *cells) for name, cells in _table_rows(outcomes)]
    for name, values in record["averages"].items():
        rows.append((f"average: {name}", "main metrics", *score_cells("", Score(**values))))
    table = markdown_table(COLUMNS, rows)
    notes = [f"\n{each.task.name}: {note}" for each in outcomes for note in each.task.notes(each)]
    notes += [f"\n{name} skipped: {reason}" for name, reason in record["skipped"].items()]
    return "\n".join([table, *notes]) + "\n"


def _table_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (outcome.task.row_name(outcome), (metric, *score_cells(metric, score)))
        for outcome in outcomes
        for metric, score in outcome.scores.items()
    ]


def is_rank(metric: str) -> bool:
    """Returns whether a metric is a rank (lower is better) rather than a fraction of queries."""
    return metric.endswith("_rank")


def is_fraction(metric: str) -> bool:
    """Returns whether a metric is a fraction from 0 to 1; others are ranks, losses and CIDEr."""
    return not (is_rank(metric) or metric.endswith("_loss") or metric == "cider")


def score_cells(metric: str, score: Score) -> tuple[str, str, str, str]:
    """Formats (value, interval, chance, number of queries) of a metric."""
    show = _percent_text if is_fraction(metric) else _number_text
    show = _rank_text if is_rank(metric) else show
    interval = score.interval  # the reason if there is none
    if score.low is not None and score.high is not None:
        interval = f"{show(score.low)} to {show(score.high)}"
    return show(score.value), interval, show(score.chance), str(score.num_queries)


def _percent_text(fraction: float) -> str:
    digits = ".1f" if fraction >= 0.001 or fraction == 0 else ".2g"
    return f"{100 * fraction:{digits}} %"


def _number_text(value: float) -> str:
    return f"{value:.3f}"


def _rank_text(rank: float) -> str:
    return f"{rank:.0f}" if rank == round(rank) else f"{rank:.1f}"


def scores_csv(outcomes: Sequence[Outcome]) -> str:
    """Formats the metrics of all evaluations as CSV, one row per metric."""
    text = io.StringIO()
    names = [field.name for field in fields(Score)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["evaluation", "metric", *names])
    for outcome in outcomes:
        for metric, score in outcome.scores.items():
            writer.writerow([outcome.task.name, metric, *asdict(score).values()])
    return text.getvalue()


def check_goals(evaluations: Mapping[str, EvaluationSection], outcomes: Sequence[Outcome]) -> None:
    """Checks the metrics against the goals of the config.

    Raises:
        InputError: if a goal names a metric that the evaluation does not have.
        RunError: if a metric is below its goal, or a rank or loss above it; lists all of them.
    """
    missed = []
    for outcome in outcomes:
        name, scores = outcome.task.name, outcome.scores
        for metric, goal in evaluations[name].goals.items():
            if metric not in scores:
                raise InputError(
                    f"evaluations.{name}.goals: expected one of {', '.join(scores)}; found {metric}"
                )
            value = scores[metric].value
            is_low_better = is_rank(metric) or metric.endswith("_loss")
            if value > goal if is_low_better else value < goal:
                missed.append(f"  {name}: {metric}: goal {goal:g}, found {value:.4g}")
    if missed:
        raise RunError("metrics miss their goals:\n" + "\n".join(missed))


def json_text(record: Any) -> str:
    """Formats a record as JSON that every parser reads: NaN and infinity become null."""
    return json.dumps(_finite(record), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(folder: Path, record: dict[str, Any], *, table: str, rows: str) -> None:
    """Writes results.json, results.md and results.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.csv", rows.encode())
    write_atomically(folder / "results.json", json_text(record).encode())
    write_atomically(folder / "results.md", table.encode())
