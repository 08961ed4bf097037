"""Reads the inputs of all tasks: samples, labels, class names, captions.

Does not import torch, so that `--dry-run` is fast. Tasks are read before the model is loaded, so
that a missing label is reported before hours of encoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from data_prep.errors import InputError
from eval.datasets.datasets import EvaluationSet, EvaluationSets, MissingDatasetError
from eval.datasets.download import fetch_dataset
from eval.datasets.tar_dataset import TYPE, TarDataset
from eval.datasets.views import samples_having
from eval.tasks.task import EvaluationSection, Task, task_types


@dataclass(frozen=True)
class Tasks:
    """The tasks of a config."""

    present: list[Task]
    skipped: dict[str, str]  # evaluation -> reason; filled only with skip_missing


def fetch_datasets(evaluations: Mapping[str, EvaluationSection]) -> None:
    """Downloads all datasets that are given by URL and not downloaded yet.

    Args:
        evaluations: evaluation name -> config section.

    Raises:
        InputError: if there is no dataset at a URL.
        RunError: if a download fails; running the command again retries it.
    """
    for section in evaluations.values():
        for location, split in section.locations():
            fetch_dataset(location, split=split)


def read_tasks(
    evaluations: Mapping[str, EvaluationSection], *, skip_missing: bool = False, seed: int = 0
) -> Tasks:
    """Reads and checks every label and caption of all tasks.

    Args:
        evaluations: evaluation name -> config section.
        skip_missing: whether to skip evaluations whose dataset is missing.
        seed: seed of the tasks' random draws.

    Raises:
        InputError: if a file is missing, a sample lacks its label or caption, or no sample has the
            views of an evaluation.
    """
    types = {each.section_type: each for each in task_types().values()}
    sets = EvaluationSets()
    present, skipped = [], {}
    for name, section in evaluations.items():
        try:
            dataset = sets.open_section(section)
            _check_dataset_type(name, types[type(section)], dataset)
            views = section.views_of(dataset)
            having = samples_having(dataset, views)
            task = types[type(section)].read(name, section, having, sets=sets, seed=seed)
            num_lacking = len(dataset) - len(having)
            present.append(replace(task, needed_views=tuple(views), num_lacking=num_lacking))
        except MissingDatasetError as error:
            if not skip_missing:
                raise InputError(f"evaluations.{name}: {error}") from None
            skipped[name] = str(error)
    return Tasks(present, skipped)


def _check_dataset_type(name: str, task: type[Task], dataset: EvaluationSet) -> None:
    """Checks that the tars were published for this kind of task.

    Raises:
        InputError: if the type in dataset_type.txt belongs to other tasks.
    """
    if not isinstance(dataset, TarDataset) or not task.dataset_types:
        return
    path = dataset.find_text_file(TYPE)
    found = path.read_text().strip() if path is not None else None
    suited = [each.task_name for each in task_types().values() if found in each.dataset_types]
    if suited and task.task_name not in suited:
        raise InputError(
            f"evaluations.{name}: task: expected {' or '.join(suited)} for a {found} dataset "
            f"({path}), found {task.task_name}"
        )
