"""Reads everything an evaluation needs besides the model: samples, labels, class names, captions.

Needs no torch, so that `--dry-run` is quick; and it runs before the model is loaded, so that a
missing label is found before hours of encoding.
"""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.errors import InputError
from eval.config import EvaluateConfig
from eval.datasets.datasets import EvaluationSets, MissingDatasetError
from eval.datasets.download import fetch_dataset
from eval.tasks.classification_readers import (
    read_classification_task,
    read_few_shot_task,
    read_linear_probe_task,
    read_multi_label_task,
    read_nearest_neighbours_task,
)
from eval.tasks.retrieval_readers import (
    read_association_task,
    read_caption_choice_task,
    read_media_retrieval_task,
    read_retrieval_task,
)
from eval.tasks.task import Task


@dataclass(frozen=True)
class Tasks:
    """What a config asks for."""

    present: list[Task]
    skipped: dict[str, str]  # evaluation -> why; only where the config lets them be


def fetch_datasets(config: EvaluateConfig) -> None:
    """Fetches what evaluations name by URL and is not there yet.

    Raises:
        InputError: there is nothing at a URL.
        RunError: it cannot be fetched now.
    """
    for section in config.evaluations.values():
        fetch_dataset(section.dataset, split=section.split)
        for key in ("train", "validation", "other"):
            place = getattr(section, key, None)
            if place is not None:
                fetch_dataset(place, split=getattr(section, f"{key}_split"))


def read_tasks(config: EvaluateConfig) -> Tasks:
    """The tasks of a config, in its order, with every label and caption read and checked.

    Raises:
        InputError: a file is missing, or a sample lacks its label or caption, naming it.
    """
    readers = {
        "zero_shot_classification": read_classification_task,
        "linear_probe": read_linear_probe_task,
        "nearest_neighbours": read_nearest_neighbours_task,
        "few_shot": read_few_shot_task,
        "multi_label_classification": read_multi_label_task,
        "retrieval": read_retrieval_task,
        "media_retrieval": read_media_retrieval_task,
        "caption_choice": read_caption_choice_task,
        "association": read_association_task,
    }
    sets = EvaluationSets()
    present, skipped = [], {}
    for name, section in config.evaluations.items():
        try:
            present.append(readers[section.task](name, section, sets, config))
        except MissingDatasetError as error:
            if not config.skip_missing:
                raise InputError(f"evaluations.{name}: {error}") from None
            skipped[name] = str(error)
    return Tasks(present, skipped)
