"""What results.json holds of an evaluation, besides its metrics: how each task was measured."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

from eval.embeddings.store import sum_of_texts
from eval.metrics.retrieval import DIRECTIONS
from eval.tasks.runner import Outcome
from eval.tasks.task import (
    AssociationTask,
    CaptionChoiceTask,
    ClassificationTask,
    FewShotTask,
    LinearProbeTask,
    MediaRetrievalTask,
    MultiLabelTask,
    NearestNeighboursTask,
    RetrievalTask,
    TrainedTask,
)

OBJECTIVE = "mean cross-entropy + l2 * |W|^2 / (2 n)"


def outcome_record(outcome: Outcome) -> dict[str, Any]:
    """What results.json holds of an evaluation."""
    task = outcome.task
    details = {
        ClassificationTask: _zero_shot_record,
        LinearProbeTask: _linear_probe_record,
        NearestNeighboursTask: _nearest_neighbours_record,
        FewShotTask: _few_shot_record,
        MultiLabelTask: _multi_label_record,
        RetrievalTask: _retrieval_record,
        MediaRetrievalTask: _media_retrieval_record,
        CaptionChoiceTask: _caption_choice_record,
        AssociationTask: _association_record,
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
        **({} if outcome.space is None else {"embedding_space": outcome.space.record()}),
        "seconds": round(outcome.seconds, 2),
    }


def _classification_record(outcome: Outcome) -> dict[str, Any]:
    task, result = outcome.task, outcome.result
    recalls = zip(task.class_labels, result.class_recalls.tolist(), strict=True)
    return {
        "num_queries": len(task.targets),
        "num_classes": len(task.class_names),
        "num_classes_without_items": int(sum(math.isnan(r) for r in result.class_recalls)),
        "class_names": task.class_names,
        "class_recalls": {name: None if math.isnan(r) else r for name, r in recalls},
        "confusion_matrix": result.confusion.tolist(),
    }


def _zero_shot_record(outcome: Outcome) -> dict[str, Any]:
    record = {"task": "zero_shot_classification"} | _classification_record(outcome)
    record |= _prompts_record(outcome.task)
    if outcome.task.groups is not None:
        record["group_accuracies"] = outcome.result.group_accuracies
    return record


def _prompts_record(task: ClassificationTask | MultiLabelTask) -> dict[str, Any]:
    return {
        "num_prompts": len(task.texts),
        "prompts_sha256": sum_of_texts(task.texts),
        "prompt_templates": task.prompt_templates,
    }


def _train_record(task: TrainedTask) -> dict[str, Any]:
    return {
        "features": "the embeddings, L2-normalised",
        "num_train": len(task.train.indices),
        "train_fingerprint": task.train.source.dataset.fingerprint,
    }


def _linear_probe_record(outcome: Outcome) -> dict[str, Any]:
    task, result = outcome.task, outcome.result
    return {
        "task": "linear_probe",
        **_classification_record(outcome),
        **_train_record(task),
        "objective": OBJECTIVE,
        "l2": result.l2,
        "validation_accuracies": {f"{k:.4g}": v for k, v in result.validation_accuracies.items()},
        "num_validation": len(task.validation.indices),
        "validation_fingerprint": task.validation.source.dataset.fingerprint,
    }


def _nearest_neighbours_record(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    return {
        "task": "nearest_neighbours",
        **_classification_record(outcome),
        **_train_record(task),
        "num_neighbours": task.num_neighbours,
        "temperature": task.temperature,
    }


def _few_shot_record(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    return {
        "task": "few_shot",
        "num_queries": len(task.targets),
        "num_classes": len(task.class_names),
        "class_names": task.class_names,
        **_train_record(task),
        "objective": OBJECTIVE,
        "l2": task.l2,
        "shots": task.shots,
        "num_draws": task.num_draws,
        "seed": task.seed,
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
        "class_names": task.class_names,
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
        "directions": list(DIRECTIONS),
    }


def _media_retrieval_record(outcome: Outcome) -> dict[str, Any]:
    task, other = outcome.task, outcome.task.other.dataset
    return {
        "task": "media_retrieval",
        "num_media": len(task.dataset),
        "num_other_media": len(other),
        "num_right_pairs": len(task.relevance.media),
        "other_folder": str(other.folder),
        "other_fingerprint": other.fingerprint,
        "directions": list(task.directions),
    }


def _caption_choice_record(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    return {
        "task": "caption_choice",
        "num_queries": len(task.dataset),
        "num_captions": len(task.texts),
        "captions_sha256": sum_of_texts(task.texts),
        "num_groups": None if task.groups is None else len(task.groups),
    }


def _association_record(outcome: Outcome) -> dict[str, Any]:
    task = outcome.task
    return {
        "task": "association",
        "num_queries": len(task.cues),
        "num_media": len(task.dataset),
        "cues_sha256": sum_of_texts(task.cues),
    }
