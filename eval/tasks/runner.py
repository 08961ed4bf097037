"""Runs tasks: encodes their media and texts, and measures them on the embeddings."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import InputError
from eval.embeddings.items import ItemSet
from eval.tasks.task import Outcome, Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from eval.embeddings.store import EmbeddingStore
    from eval.metrics.intervals import Bootstrap, Score
    from eval.models.encoder import Encoder
    from eval.tasks.single_label import LabelledItems

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of a store, moved to the device on which tasks are measured."""

    store: EmbeddingStore
    device: torch.device
    num_dims: int | None = None  # first numbers of an embedding that are measured; None: all
    computed: Mapping[str, Any] = field(default_factory=dict)  # task -> result of `Task.compute`

    def media(self, source: ItemSet) -> Tensor:
        """Returns the embeddings of a set of items, [Q, D]."""
        return source.embeddings(self.store, num_dims=self.num_dims).to(self.device)

    def measured(self, task: Task) -> Tensor:
        """Returns the embeddings of a task's first media set, [Q, D]; [0, 0] if it needs none."""
        import torch

        if not task.measures_embeddings:
            return torch.empty(0, 0, device=self.device)
        return self.media(task.media_sets[0])

    def labelled_media(self, items: LabelledItems) -> tuple[Tensor, Tensor]:
        """Returns ([n, D] embeddings, int64 [n] classes) of labelled items."""
        import torch

        indices = torch.from_numpy(items.indices).to(self.device)
        return self.media(items.source)[indices], torch.from_numpy(items.targets).to(self.device)

    def texts(self, task: Task) -> Tensor:
        """Returns the embeddings of a task's texts, [M, D]."""
        return self._shortened(self.store.texts(task.texts))

    def _shortened(self, embeddings: Tensor) -> Tensor:
        from eval.models.loaded_model import first_numbers

        return first_numbers(embeddings.to(self.device), self.num_dims)


def check_fingerprints(tasks: Sequence[Task]) -> None:
    """Checks that datasets which must differ have different contents.

    Raises:
        InputError: if two of them have the same fingerprint; the message names both.
    """
    for task in tasks:
        folder_of: dict[str, Path] = {}
        for dataset in task.disjoint_sets:
            if dataset.fingerprint in folder_of:
                raise InputError(
                    f"evaluations.{task.name}: expected training, validation and test items to "
                    f"differ; found equal contents in {folder_of[dataset.fingerprint]} and "
                    f"{dataset.folder}; change train, validation or their splits"
                )
            folder_of[dataset.fingerprint] = dataset.folder


def check_towers(tasks: Sequence[Task], encoder: Encoder) -> None:
    """Checks that the model has a tower for everything to encode, before anything is encoded.

    Raises:
        InputError: if a tower is missing; the message names the evaluation.
    """
    for task in tasks:
        try:
            for source in task.media_sets:
                source.check(encoder)
            if task.texts and "text" not in encoder.kinds:
                raise InputError(
                    f"expected a model with a tower for text, which encodes the {task.text_name}; "
                    f"found towers for {sorted(encoder.kinds)}"
                )
        except InputError as error:
            raise InputError(
                f"evaluations.{task.name}: {error}; remove this evaluation, or name another "
                "checkpoint"
            ) from None


def encode_tasks(tasks: Sequence[Task], store: EmbeddingStore) -> None:
    """Computes this process's share of all missing embeddings that are measured.

    Raises:
        InputError: see `EmbeddingStore`.
    """
    for task in (each for each in tasks if each.measures_embeddings):
        for source in task.media_sets:
            source.encode(store)
        if task.texts:
            store.encode_texts(task.texts, name=task.text_name)


def compute_tasks(tasks: Sequence[Task], encoder: Encoder) -> dict[str, Any]:
    """Computes what tasks need in addition to embeddings; every process must call it.

    Raises:
        InputError: if a sample cannot be read.
    """
    return {task.name: task.compute(encoder) for task in tasks}


def measure_tasks(
    tasks: Sequence[Task],
    embeddings: Embeddings,
    *,
    bootstrap: Bootstrap,
    matryoshka_dims: Sequence[int] = (),
) -> list[Outcome]:
    """Measures all tasks; all embeddings must have been computed before.

    Args:
        tasks: tasks to measure.
        embeddings: embeddings of the tasks' media and texts.
        bootstrap: settings of resampling.
        matryoshka_dims: numbers of first elements of the embeddings to measure as well.

    Raises:
        InputError: see `EmbeddingStore`.
    """
    outcomes = []
    for task in tasks:
        start = time.monotonic()
        media = embeddings.measured(task)
        result, other = task.measure(media, embeddings, bootstrap=bootstrap)
        counts = task.audit(media, embeddings)
        of_dims: dict[str, Score] = {}
        for dim in matryoshka_dims if task.measures_embeddings else ():
            of_dims |= _scores_of_dim(task, replace(embeddings, num_dims=dim), bootstrap)
        seconds = time.monotonic() - start
        media, other = media.cpu(), other.cpu()
        space = task.embedding_space(media, other, result)
        outcomes.append(Outcome(task, result, media, other, space, counts, seconds, of_dims))
        logger.info("%s: %.1f s", task.name, seconds)
    return outcomes


def _scores_of_dim(task: Task, embeddings: Embeddings, bootstrap: Bootstrap) -> dict[str, Score]:
    result, _ = task.measure(embeddings.measured(task), embeddings, bootstrap=bootstrap)
    return {f"dim{embeddings.num_dims}_{name}": score for name, score in result.scores.items()}
