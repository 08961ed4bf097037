"""Outcomes to files: results.json with full provenance, a table for people in results.md, and one
for programs in results.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from data_prep.config_file import InputError, RunError
from data_prep.shard_format import write_atomically
from eval.config import EvaluateConfig
from eval.embedding_store import sum_of_texts
from eval.encoder import Encoder
from eval.intervals import CONFIDENCE, Score
from eval.loaded_model import ModelOrigin
from eval.markdown_table import markdown_table
from eval.measure import Outcome
from eval.tasks import ClassificationTask, LinearProbeTask, MultiLabelTask, RetrievalTask
from pretrain.run_folder import describe_environment

COLUMNS = ("evaluation", "figure", "value", "95 % interval", "chance", "n")


def results_record(
    config: EvaluateConfig,
    outcomes: Sequence[Outcome],
    *,
    encoder: Encoder,
    seconds: float,
) -> dict[str, Any]:
    """What results.json holds: the figures, and everything they are a function of.

    Args:
        config: the evaluation's config.
        outcomes: of its tasks.
        encoder: that made the embeddings.
        seconds: of the whole evaluation.
    """
    return {
        "checkpoint": _model_record(encoder.origin),
        "evaluations": {outcome.task.name: _outcome_record(outcome) for outcome in outcomes},
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
        "marks": list(origin.marks),
        "model_sha256": origin.sha256,
    }


def _outcome_record(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    details = {
        ClassificationTask: _classification_record,
        LinearProbeTask: _linear_probe_record,
        MultiLabelTask: _multi_label_record,
        RetrievalTask: _retrieval_record,
    }
    return {
        "dataset": {
            "folder": str(task.dataset.folder),
            "media": task.dataset.info.media,
            "num_samples": len(task.dataset),
            "fingerprint": task.dataset.fingerprint,
        },
        "scores": {name: asdict(score) for name, score in outcome.result.scores.items()},
        **details[type(task)](outcome),
        "seconds": round(outcome.seconds, 2),
    }


def _classification_record(outcome: Outcome) -> dict[str, Any]:
    task, result = outcome.task, outcome.result
    recalls = zip(task.class_names, result.class_recalls.tolist(), strict=True)
    return {
        "task": "zero_shot_classification",
        "num_queries": len(task.targets),
        "num_classes": len(task.class_names),
        "num_classes_without_items": int(sum(math.isnan(r) for r in result.class_recalls)),
        **_prompts_record(task),
        "class_recalls": {name: None if math.isnan(r) else r for name, r in recalls},
        "confusion_matrix": result.confusion.tolist(),
    }


def _prompts_record(task: ClassificationTask | MultiLabelTask) -> dict[str, Any]:
    return {
        "num_prompts": len(task.texts),
        "prompts_sha256": sum_of_texts(task.texts),
        "class_names": task.class_names,
        "prompt_templates": task.prompt_templates,
    }


def _linear_probe_record(outcome: Outcome) -> dict[str, Any]:
    task, result = outcome.task, outcome.result
    return _classification_record(outcome) | {
        "task": "linear_probe",
        "features": "the embeddings, L2-normalised",
        "objective": "mean cross-entropy + strength * |W|^2 / (2 n)",
        "strength": result.strength,
        "validation_accuracies": {f"{k:.4g}": v for k, v in result.validation_accuracies.items()},
        "num_train": len(task.train.places),
        "num_validation": len(task.validation.places),
        "train_fingerprint": task.train.source.dataset.fingerprint,
        "validation_fingerprint": task.validation.source.dataset.fingerprint,
    }


def _multi_label_record(outcome: Outcome) -> dict[str, Any]:
    task, precisions = outcome.task, outcome.result.average_precisions.tolist()
    by_class = zip(task.class_names, precisions, strict=True)
    return {
        "task": "multi_label_classification",
        "num_queries": len(task.is_of_class),
        "num_classes": len(task.class_names),
        "num_classes_without_items": sum(map(math.isnan, precisions)),
        "mean": "over the classes that have items",
        "num_labels": int(task.is_of_class.sum()),
        **_prompts_record(task),
        "average_precisions": {n: None if math.isnan(value) else value for n, value in by_class},
    }


def _retrieval_record(outcome: Outcome) -> dict[str, Any]:
    task, result = outcome.task, outcome.result
    return {
        "task": "retrieval",
        "num_media": len(task.dataset),
        "num_captions": len(task.captions),
        "captions_sha256": sum_of_texts(task.captions),
        "num_repeated_captions": len(task.captions) - len(set(task.captions)),
        "num_distractor_captions": len(task.distractor_captions),
        "media_to_text_gallery": result.media_to_text.gallery_size,
        "text_to_media_gallery": result.text_to_media.gallery_size,
        "recall": "hit rate: a query succeeds if any right answer is among the first k",
        "true_recall": "share of a query's right answers that are among the first k",
        "equal_captions": "merged" if task.merges_equal_captions else "own",
    }


def scores_table(outcomes: Sequence[Outcome]) -> str:
    """The figures of all evaluations as a Markdown table with aligned columns."""
    table = markdown_table(COLUMNS, [(name, *cells) for name, cells in _table_rows(outcomes)])
    notes = [
        f"\n{outcome.task.name}: {note}"
        for outcome in outcomes
        if isinstance(outcome.task, RetrievalTask)
        and (note := repeated_captions_note(outcome.task))
    ]
    return "\n".join([table, *notes]) + "\n"


def repeated_captions_note(task: RetrievalTask) -> str:
    """What a reader must know of captions that stand at several items; empty if none does."""
    num_repeated = len(task.captions) - len(set(task.captions))
    if not num_repeated:
        return ""
    if task.merges_equal_captions:
        return (
            f"{num_repeated} captions repeat the words of another one: each is right for all items "
            "with a caption of its words (equal_captions: merged); figures of the literature count "
            "its own item alone."
        )
    return (
        f"{num_repeated} captions repeat the words of another one: each is right only for its own "
        "item, which bounds the recall that any model can reach."
    )


def _table_rows(outcomes: Sequence[Outcome]) -> list[tuple[str, tuple[str, ...]]]:
    return [
        (outcome.task.name, (figure, *score_cells(figure, score)))
        for outcome in outcomes
        for figure, score in outcome.result.scores.items()
    ]


def is_rank(figure: str) -> bool:
    """Whether a figure counts places, best 1, rather than being a share of queries."""
    return figure.endswith("_rank")


def score_cells(figure: str, score: Score) -> tuple[str, str, str, str]:
    """(value, interval, chance, number of queries) as text."""
    show = _rank_text if is_rank(figure) else _percent_text
    interval = f"{show(score.low)} to {show(score.high)}"
    return show(score.value), interval, show(score.chance), str(score.num_queries)


def _percent_text(share: float) -> str:
    return f"{100 * share:.1f} %" if share >= 0.001 or share == 0 else f"{100 * share:.2g} %"


def _rank_text(rank: float) -> str:
    return f"{rank:.0f}" if rank == round(rank) else f"{rank:.1f}"


def scores_csv(outcomes: Sequence[Outcome]) -> str:
    """The figures of all evaluations, a row each, for programs."""
    text = io.StringIO()
    names = [field.name for field in fields(Score)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["evaluation", "figure", *names])
    for outcome in outcomes:
        for figure, score in outcome.result.scores.items():
            writer.writerow([outcome.task.name, figure, *asdict(score).values()])
    return text.getvalue()


def refuse_missed_goals(config: EvaluateConfig, outcomes: Sequence[Outcome]) -> None:
    """
    Raises:
        InputError: a goal is of a figure that there is not.
        RunError: a figure is below its goal, or a rank above it; all are named.
    """
    missed = []
    for outcome in outcomes:
        name, scores = outcome.task.name, outcome.result.scores
        for figure, goal in config.evaluations[name].goals.items():
            if figure not in scores:
                raise InputError(
                    f"evaluations.{name}.goals: expected one of {', '.join(scores)}; found {figure}"
                )
            value = scores[figure].value
            if value > goal if is_rank(figure) else value < goal:
                missed.append(f"  {name}: {figure} is {value:.4g}, the goal {goal:g}")
    if missed:
        raise RunError("goals are missed:\n" + "\n".join(missed))


def write_results(folder: Path, record: dict[str, Any], *, table: str, rows: str) -> None:
    """Writes results.json, results.md and results.csv."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "results.csv", rows.encode())
    write_atomically(folder / "results.json", json.dumps(record, indent=2).encode() + b"\n")
    write_atomically(folder / "results.md", table.encode())
