"""Runs tasks through a model: media and texts to embeddings, embeddings to scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor

from data_prep.config_file import InputError
from eval.class_prompts import average_prompts, class_prompts
from eval.embeddings import Encoder, encode_media, encode_texts
from eval.intervals import Bootstrap
from eval.linear_probe import LinearProbeResult, train_probe, with_ones
from eval.multi_label import MultiLabelResult, classify_labels
from eval.retrieval import RetrievalResult, retrieve
from eval.tasks import (
    ClassificationTask,
    EvaluationSet,
    LabelledItems,
    LinearProbeTask,
    MultiLabelTask,
    RetrievalTask,
    Task,
)
from eval.zero_shot import ClassificationResult, classify

logger = logging.getLogger(__name__)

# Dataset -> [Q, D] L2-normalised embeddings of its media, on the CPU; made once.
Embed = Callable[[EvaluationSet], Tensor]


@dataclass(frozen=True)
class Outcome:
    """A task, its result, and the embeddings that the report shows neighbours from."""

    task: Task
    result: ClassificationResult | MultiLabelResult | RetrievalResult
    media_embeddings: Tensor  # [Q, D], L2-normalised
    text_embeddings: Tensor  # [K, D] classes, or [M + distractors, D] captions, L2-normalised
    seconds: float


def check_towers(tasks: Sequence[Task], encoder: Encoder) -> None:
    """Checks, before anything is encoded, that the model has a tower for every task's media.

    Raises:
        InputError: naming the evaluation.
    """
    for task in tasks:
        kind = task.dataset.info.media
        if kind not in encoder.transforms:
            raise InputError(
                f"evaluations.{task.name}: {task.dataset.folder} holds {kind}, but the model has "
                f"towers for {sorted(encoder.transforms)} only; remove this evaluation, or name "
                "another checkpoint"
            )


def measure_tasks(
    tasks: Sequence[Task], *, encoder: Encoder, bootstrap: Bootstrap
) -> list[Outcome]:
    """The outcome of each task; the media of a dataset that several tasks use are encoded once.

    Raises:
        InputError: see `eval.embeddings`.
    """
    measures = {
        ClassificationTask: measure_classification,
        LinearProbeTask: measure_linear_probe,
        MultiLabelTask: measure_multi_label,
        RetrievalTask: measure_retrieval,
    }
    embed = cache(partial(encode_media, encoder))
    outcomes = []
    for task in tasks:
        start = time.monotonic()
        result, texts = measures[type(task)](
            task, embed=embed, encoder=encoder, bootstrap=bootstrap
        )
        seconds = time.monotonic() - start
        outcomes.append(Outcome(task, result, embed(task.dataset), texts, seconds))
        logger.info("%s: %.1f s", task.name, outcomes[-1].seconds)
    return outcomes


def measure_classification(
    task: ClassificationTask, *, embed: Embed, encoder: Encoder, bootstrap: Bootstrap
) -> tuple[ClassificationResult, Tensor]:
    """The result of a classification, and its class embeddings [K, D].

    Args:
        task: what to measure.
        embed: see `Embed`.
        encoder: for the prompts.
        bootstrap: for the intervals.
    """
    class_embeddings = encode_classes(task, encoder)
    result = classify(
        embed(task.dataset).to(encoder.device),
        class_embeddings.to(encoder.device),
        targets=task.targets,
        bootstrap=bootstrap,
    )
    return result, class_embeddings


def measure_linear_probe(
    task: LinearProbeTask, *, embed: Embed, encoder: Encoder, bootstrap: Bootstrap
) -> tuple[LinearProbeResult, Tensor]:
    """The result of a linear probe, and its weights and biases [K, D + 1].

    Args:
        task: what to measure.
        embed: see `Embed`.
        encoder: says where to compute.
        bootstrap: for the intervals.
    """

    def of(items: LabelledItems) -> tuple[Tensor, Tensor]:
        embeddings = embed(items.dataset)[torch.from_numpy(items.places)]
        return embeddings.to(encoder.device), torch.from_numpy(items.targets).to(encoder.device)

    probe, accuracies = train_probe(
        of(task.train),
        of(task.validation),
        num_classes=len(task.class_names),
        strength=task.strength,
    )
    weights = probe.as_class_embeddings()
    classified = classify(
        with_ones(embed(task.dataset).to(encoder.device)),
        weights,
        targets=task.targets,
        bootstrap=bootstrap,
    )
    result = LinearProbeResult(
        **vars(classified), strength=probe.strength, validation_accuracies=accuracies
    )
    return result, weights.cpu()


def measure_multi_label(
    task: MultiLabelTask, *, embed: Embed, encoder: Encoder, bootstrap: Bootstrap
) -> tuple[MultiLabelResult, Tensor]:
    """The result of a classification with several classes per item, and its class embeddings
    [K, D]; arguments as of `measure_classification`."""
    class_embeddings = encode_classes(task, encoder)
    result = classify_labels(
        embed(task.dataset).to(encoder.device),
        class_embeddings.to(encoder.device),
        is_of_class=task.is_of_class,
        bootstrap=bootstrap,
    )
    return result, class_embeddings


def encode_classes(task: ClassificationTask | MultiLabelTask, encoder: Encoder) -> Tensor:
    """[K, D] class embeddings of a task's prompts."""
    prompts = class_prompts(task.class_names, task.prompt_templates)
    return average_prompts(
        encode_texts(encoder, prompts, name=f"prompts of {task.name}"),
        num_classes=len(task.class_names),
    )


def measure_retrieval(
    task: RetrievalTask, *, embed: Embed, encoder: Encoder, bootstrap: Bootstrap
) -> tuple[RetrievalResult, Tensor]:
    """The result of a retrieval, and the embeddings [M + X, D] of captions and distractors.

    Args:
        task: what to measure.
        embed: see `Embed`.
        encoder: for the captions.
        bootstrap: for the intervals.
    """
    num_captions = len(task.captions)
    texts = encode_texts(
        encoder, task.captions + task.distractor_captions, name=f"captions of {task.name}"
    )
    on_device = texts.to(encoder.device)
    result = retrieve(
        embed(task.dataset).to(encoder.device),
        on_device[:num_captions],
        media_of_text=task.media_of_text,
        pairs=task.pairs,
        distractor_embeddings=on_device[num_captions:],
        ks=task.ks,
        bootstrap=bootstrap,
    )
    return result, texts
