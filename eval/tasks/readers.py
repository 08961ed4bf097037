"""Reads the inputs of all tasks: samples, labels, class names, captions.

Needs no torch, so that `--dry-run` is quick. Tasks are read before the model is loaded, so that a
missing label is found before hours of encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet, EvaluationSets, MissingDatasetError
from eval.datasets.download import fetch_dataset
from eval.datasets.tar_dataset import TYPE, TarDataset
from eval.tasks.task import EvaluationSection, Task, task_types


@dataclass(frozen=True)
class Tasks:
    """The tasks of a config."""

    present: list[Task]
    skipped: dict[str, str]  # evaluation -> reason; only if the config says skip_missing


def fetch_datasets(evaluations: Mapping[str, EvaluationSection]) -> None:
    """Downloads all datasets that are named by URL and not downloaded yet.

    Args:
        evaluations: sections of the config, by name.

    Raises:
        InputError: if there is nothing at a URL.
        RunError: if a download fails for now.
    """
    for section in evaluations.values():
        for location, split in section.locations():
            fetch_dataset(location, split=split)


def read_tasks(
    evaluations: Mapping[str, EvaluationSection], *, skip_missing: bool = False, seed: int = 0
) -> Tasks:
    """Reads and checks every label and caption of all tasks.

    Args:
        evaluations: sections of the config, by name.
        skip_missing: leave out evaluations whose dataset is missing.
        seed: seed of whatever the tasks draw.

    Raises:
        InputError: if a file is missing, or a sample lacks its label or caption.
    """
    types = {each.section_type: each for each in task_types().values()}
    sets = EvaluationSets()
    present, skipped = [], {}
    for name, section in evaluations.items():
        try:
            dataset = sets.of_section(section)
            _check_dataset_type(name, types[type(section)], dataset)
            task = types[type(section)].read(name, section, dataset, sets=sets, seed=seed)
            present.append(task)
        except MissingDatasetError as error:
            if not skip_missing:
                raise InputError(f"evaluations.{name}: {error}") from None
            skipped[name] = str(error)
    return Tasks(present, skipped)


def _check_dataset_type(name: str, task: type[Task], dataset: EvaluationSet) -> None:
    """Checks that tars were not published for another kind of task.

    Raises:
        InputError: if dataset_type.txt names a type that other tasks are made for.
    """
    if not isinstance(dataset, TarDataset) or not task.dataset_types:
        return
    path = dataset.find_text_file(TYPE)
    found = path.read_text().strip() if path is not None else None
    suited = [each.task_name for each in task_types().values() if found in each.dataset_types]
    if suited and task.task_name not in suited:
        raise InputError(
            f"evaluations.{name}: {path} says {found}: set task: {' or '.join(suited)}, found "
            f"{task.task_name}"
        )
