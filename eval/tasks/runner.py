"""Runs tasks through a model: media and texts to embeddings, embeddings to scores."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from eval.embeddings.store import EmbeddingStore
from eval.metrics.association import AssociationResult, associate
from eval.metrics.caption_choice import CaptionChoiceResult, choose_captions, choose_in_groups
from eval.metrics.embedding_space import EmbeddingSpace, embedding_space
from eval.metrics.few_shot import FewShotResult, classify_from_few
from eval.metrics.intervals import Bootstrap
from eval.metrics.knn import neighbour_votes
from eval.metrics.linear_probe import LinearProbeResult, train_probe, with_ones
from eval.metrics.multi_label import MultiLabelResult, classify_labels
from eval.metrics.retrieval import RetrievalResult, retrieve
from eval.metrics.zero_shot import (
    ClassificationResult,
    classification_result,
    classify,
    rank_scores,
)
from eval.models.encoder import Encoder, check_tower
from eval.tasks.class_prompts import average_prompts
from eval.tasks.task import (
    AssociationTask,
    CaptionChoiceTask,
    ClassificationTask,
    FewShotTask,
    LabelledItems,
    LinearProbeTask,
    MediaRetrievalTask,
    MediaSet,
    MultiLabelTask,
    NearestNeighboursTask,
    RetrievalTask,
    Task,
)

logger = logging.getLogger(__name__)


Result = (
    ClassificationResult
    | FewShotResult
    | MultiLabelResult
    | RetrievalResult
    | CaptionChoiceResult
    | AssociationResult
)


@dataclass(frozen=True)
class Embeddings:
    """What a store holds of a task, where it is to be computed with."""

    store: EmbeddingStore
    device: torch.device

    def of_set(self, source: MediaSet) -> Tensor:
        """[Q, D] of a dataset's media items."""
        return self.store.media(source.dataset, source.keys).to(self.device)

    def of_labelled(self, items: LabelledItems) -> tuple[Tensor, Tensor]:
        """([n, D], int64 [n] classes) of some items."""
        indices = torch.from_numpy(items.indices).to(self.device)
        return self.of_set(items.source)[indices], torch.from_numpy(items.targets).to(self.device)

    def of_texts(self, task: Task) -> Tensor:
        """[M, D] of its texts, in their order."""
        return self.store.texts(task.texts).to(self.device)


@dataclass(frozen=True)
class Outcome:
    """A task, its result, and the embeddings that the report shows neighbours from."""

    task: Task
    result: Result
    media_embeddings: Tensor  # [Q, D], L2-normalised
    # L2-normalised: [K, D] classes, [M + distractors, D] captions, or [M, D] of the other dataset
    other_embeddings: Tensor
    space: EmbeddingSpace | None  # of retrievals
    seconds: float  # without encoding


def check_towers(tasks: Sequence[Task], encoder: Encoder) -> None:
    """Checks, before anything is encoded, that the model has a tower for every task's media.

    Raises:
        InputError: naming the evaluation.
    """
    for task in tasks:
        for source in task.media_sets:
            dataset = source.dataset
            try:
                check_tower(encoder, dataset.info.media, folder=dataset.folder)
            except InputError as error:
                raise InputError(
                    f"evaluations.{task.name}: {error}; remove this evaluation, or name another "
                    "checkpoint"
                ) from None


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

    Each is measured by a function of its own, which is given the embeddings [Q, D] of its media.

    Raises:
        InputError: see `EmbeddingStore`.
    """
    measures = {
        ClassificationTask: measure_classification,
        LinearProbeTask: measure_linear_probe,
        NearestNeighboursTask: measure_nearest_neighbours,
        FewShotTask: measure_few_shot,
        MultiLabelTask: measure_multi_label,
        RetrievalTask: measure_retrieval,
        MediaRetrievalTask: measure_media_retrieval,
        CaptionChoiceTask: measure_caption_choice,
        AssociationTask: measure_association,
    }
    outcomes = []
    for task in tasks:
        start = time.monotonic()
        media = embeddings.of_set(task.media_sets[0])
        result, other = measures[type(task)](task, media, embeddings, bootstrap=bootstrap)
        seconds = time.monotonic() - start
        media, other = media.cpu(), other.cpu()
        outcomes.append(Outcome(task, result, media, other, _space_of(task, media, other), seconds))
        logger.info("%s: %.1f s", task.name, seconds)
    return outcomes


def _space_of(task: Task, media: Tensor, other: Tensor) -> EmbeddingSpace | None:
    if not isinstance(task, (RetrievalTask, MediaRetrievalTask)):
        return None
    num_others = len(task.captions) if isinstance(task, RetrievalTask) else len(other)
    return embedding_space(media, other[:num_others], task.relevance)


def measure_classification(
    task: ClassificationTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[ClassificationResult, Tensor]:
    """The result of a classification, and its class embeddings [K, D]."""
    class_embeddings = _class_embeddings(task, embeddings)
    result = classify(
        media,
        class_embeddings,
        targets=task.targets,
        bootstrap=bootstrap,
        groups=task.groups,
    )
    return result, class_embeddings


def measure_linear_probe(
    task: LinearProbeTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[LinearProbeResult, Tensor]:
    """The result of a linear probe, and its weights and biases [K, D + 1]."""
    probe, accuracies = train_probe(
        embeddings.of_labelled(task.train),
        embeddings.of_labelled(task.validation),
        num_classes=len(task.class_names),
        l2=task.l2,
    )
    weights = probe.as_class_embeddings()
    classified = classify(with_ones(media), weights, targets=task.targets, bootstrap=bootstrap)
    result = LinearProbeResult(**vars(classified), l2=probe.l2, validation_accuracies=accuracies)
    return result, weights


def measure_nearest_neighbours(
    task: NearestNeighboursTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[ClassificationResult, Tensor]:
    """The result of a classification by neighbours, and the training items' embeddings [n, D]."""
    train, train_targets = embeddings.of_labelled(task.train)
    votes = neighbour_votes(
        media,
        train,
        train_targets,
        num_classes=len(task.class_names),
        num_neighbours=task.num_neighbours,
        temperature=task.temperature,
    )
    ranks, predictions = rank_scores(votes, targets=task.targets)
    result = classification_result(ranks, predictions, targets=task.targets, bootstrap=bootstrap)
    return result, train


def measure_few_shot(
    task: FewShotTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[FewShotResult, Tensor]:
    """The result of few-shot probes, and the training items' embeddings [n, D]."""
    train = embeddings.of_labelled(task.train)
    result = classify_from_few(
        media,
        train,
        targets=task.targets,
        num_classes=len(task.class_names),
        shots=task.shots,
        num_draws=task.num_draws,
        l2=task.l2,
        bootstrap=bootstrap,
        seed=task.seed,
    )
    return result, train[0]


def measure_multi_label(
    task: MultiLabelTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[MultiLabelResult, Tensor]:
    """The result of a classification with several classes per item, and its class embeddings
    [K, D]."""
    class_embeddings = _class_embeddings(task, embeddings)
    result = classify_labels(
        media,
        class_embeddings,
        is_of_class=task.is_of_class,
        bootstrap=bootstrap,
    )
    return result, class_embeddings


def _class_embeddings(task: ClassificationTask | MultiLabelTask, embeddings: Embeddings) -> Tensor:
    """[K, D] of a task's prompts."""
    num_prompts = [len(prompts) for prompts in task.prompts]
    return average_prompts(embeddings.of_texts(task), num_prompts=num_prompts)


def measure_retrieval(
    task: RetrievalTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[RetrievalResult, Tensor]:
    """The result of a retrieval, and the embeddings [M + X, D] of captions and distractors."""
    num_captions = len(task.captions)
    texts = embeddings.of_texts(task)
    result = retrieve(
        media,
        texts[:num_captions],
        media_of_text=task.media_of_text,
        relevance=task.relevance,
        distractor_embeddings=texts[num_captions:],
        ks=task.ks,
        bootstrap=bootstrap,
    )
    return result, texts


def measure_media_retrieval(
    task: MediaRetrievalTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[RetrievalResult, Tensor]:
    """The result of a retrieval, and the embeddings [M, D] of the other dataset's items."""
    other = embeddings.of_set(task.other)
    result = retrieve(
        media,
        other,
        media_of_text=np.arange(len(other)),  # each is drawn by itself
        relevance=task.relevance,
        ks=task.ks,
        bootstrap=bootstrap,
        directions=task.directions,
    )
    return result, other


def measure_caption_choice(
    task: CaptionChoiceTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[CaptionChoiceResult, Tensor]:
    """The result of a choice, and the embeddings [M, D] of all captions."""
    captions = embeddings.of_texts(task)
    if task.groups is not None:
        result = choose_in_groups(media, captions, groups=task.groups, bootstrap=bootstrap)
    else:
        result = choose_captions(
            media, captions, num_captions=list(map(len, task.captions)), bootstrap=bootstrap
        )
    return result, captions


def measure_association(
    task: AssociationTask, media: Tensor, embeddings: Embeddings, *, bootstrap: Bootstrap
) -> tuple[AssociationResult, Tensor]:
    """The result of an association, and the embeddings [groups, D] of the cues."""
    cues = embeddings.of_texts(task)
    result = associate(
        media,
        cues,
        groups=list(task.groups.values()),
        is_right=task.is_right,
        bootstrap=bootstrap,
    )
    return result, cues
