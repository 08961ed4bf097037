"""Runs tasks through a model: media and texts to embeddings, embeddings to scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_prep.config_file import InputError
from eval.class_prompts import average_prompts
from eval.embedding_store import EmbeddingStore
from eval.encoder import Encoder
from eval.intervals import Bootstrap
from eval.linear_probe import LinearProbeResult, train_probe, with_ones
from eval.multi_label import MultiLabelResult, classify_labels
from eval.retrieval import RetrievalResult, retrieve
from eval.tasks import (
    ClassificationTask,
    LabelledItems,
    LinearProbeTask,
    MultiLabelTask,
    RetrievalTask,
    Task,
)
from eval.zero_shot import ClassificationResult, classify

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """What a store holds of a task, where it is to be computed with."""

    store: EmbeddingStore
    device: torch.device

    def of_task(self, task: Task) -> Tensor:
        """[Q, D] of its media items."""
        return self.store.media(task.dataset, task.keys).to(self.device)

    def of_items(self, items: LabelledItems) -> Tensor:
        """[n, D] of some items."""
        source = items.source
        found = self.store.media(source.dataset, source.keys)
        return found[torch.from_numpy(items.places)].to(self.device)

    def of_texts(self, task: Task) -> Tensor:
        """[M, D] of its texts, in their order."""
        return self.store.texts(task.texts).to(self.device)


@dataclass(frozen=True)
class Outcome:
    """A task, its result, and the embeddings that the report shows neighbours from."""

    task: Task
    result: ClassificationResult | MultiLabelResult | RetrievalResult
    media_embeddings: Tensor  # [Q, D], L2-normalised
    text_embeddings: Tensor  # [K, D] classes, or [M + distractors, D] captions, L2-normalised
    seconds: float  # without encoding


def check_towers(tasks: Sequence[Task], encoder: Encoder) -> None:
    """Checks, before anything is encoded, that the model has a tower for every task's media.

    Raises:
        InputError: naming the evaluation.
    """
    for task in tasks:
        kind = task.dataset.info.media
        if kind not in encoder.front_ends:
            raise InputError(
                f"evaluations.{task.name}: {task.dataset.folder} holds {kind}, but the model has "
                f"towers for {sorted(encoder.front_ends)} only; remove this evaluation, or name "
                "another checkpoint"
            )


def encode_tasks(tasks: Sequence[Task], store: EmbeddingStore) -> None:
    """Makes this process's share of all embeddings that are missing.

    Raises:
        InputError: see `EmbeddingStore`.
    """
    for task in tasks:
        for source in task.media_sets:
            store.encode_media(source.dataset, source.keys)
        if task.texts:
            store.encode_texts(task.texts, name=task.text_name)


def measure_tasks(
    tasks: Sequence[Task], embeddings: Embeddings, *, bootstrap: Bootstrap
) -> list[Outcome]:
    """The outcome of each task, all of whose embeddings have been made.

    Raises:
        InputError: see `EmbeddingStore`.
    """
    measures = {
        ClassificationTask: measure_classification,
        LinearProbeTask: measure_linear_probe,
        MultiLabelTask: measure_multi_label,
        RetrievalTask: measure_retrieval,
    }
    outcomes = []
    for task in tasks:
        start = time.monotonic()
        result, texts = measures[type(task)](task, embeddings, bootstrap=bootstrap)
        seconds = time.monotonic() - start
        media = embeddings.of_task(task).cpu()
        outcomes.append(Outcome(task, result, media, texts.cpu(), seconds))
        logger.info("%s: %.1f s", task.name, seconds)
    return outcomes


def measure_classification(
    task: ClassificationTask, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[ClassificationResult, Tensor]:
    """The result of a classification, and its class embeddings [K, D]."""
    class_embeddings = _class_embeddings(task, embeddings)
    result = classify(
        embeddings.of_task(task), class_embeddings, targets=task.targets, bootstrap=bootstrap
    )
    return result, class_embeddings


def measure_linear_probe(
    task: LinearProbeTask, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[LinearProbeResult, Tensor]:
    """The result of a linear probe, and its weights and biases [K, D + 1]."""

    def of(items: LabelledItems) -> tuple[Tensor, Tensor]:
        return embeddings.of_items(items), torch.from_numpy(items.targets).to(embeddings.device)

    probe, accuracies = train_probe(
        of(task.train),
        of(task.validation),
        num_classes=len(task.class_names),
        strength=task.strength,
    )
    weights = probe.as_class_embeddings()
    classified = classify(
        with_ones(embeddings.of_task(task)), weights, targets=task.targets, bootstrap=bootstrap
    )
    result = LinearProbeResult(
        **vars(classified), strength=probe.strength, validation_accuracies=accuracies
    )
    return result, weights


def measure_multi_label(
    task: MultiLabelTask, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[MultiLabelResult, Tensor]:
    """The result of a classification with several classes per item, and its class embeddings
    [K, D]."""
    class_embeddings = _class_embeddings(task, embeddings)
    result = classify_labels(
        embeddings.of_task(task),
        class_embeddings,
        is_of_class=task.is_of_class,
        bootstrap=bootstrap,
    )
    return result, class_embeddings


def _class_embeddings(task: ClassificationTask | MultiLabelTask, embeddings: Embeddings) -> Tensor:
    """[K, D] of a task's prompts."""
    return average_prompts(embeddings.of_texts(task), num_classes=len(task.class_names))


def measure_retrieval(
    task: RetrievalTask, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[RetrievalResult, Tensor]:
    """The result of a retrieval, and the embeddings [M + X, D] of captions and distractors."""
    num_captions = len(task.captions)
    texts = embeddings.of_texts(task)
    result = retrieve(
        embeddings.of_task(task),
        texts[:num_captions],
        media_of_text=task.media_of_text,
        pairs=task.pairs,
        distractor_embeddings=texts[num_captions:],
        ks=task.ks,
        bootstrap=bootstrap,
    )
    return result, texts
