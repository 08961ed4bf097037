"""Opens the dataset of an evaluation, in any supported form. Does not import torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError
from data_prep.shards.subset import KeptSamples
from data_prep.storage.remote_file import is_url
from eval.datasets.columns import TableColumns
from eval.datasets.download import cached_copy, is_fetched
from eval.datasets.file_dataset import FileDataset, class_folders_in, read_class_folders
from eval.datasets.table import is_table, read_table
from eval.datasets.tar_dataset import TarDataset, holds_tars

if TYPE_CHECKING:
    from eval.tasks.task import EvaluationSection

EvaluationSet = KeptSamples | TarDataset | FileDataset


class MissingDatasetError(InputError):
    """Raised if an evaluation's dataset is not at its location."""


class EvaluationSets:
    """The datasets of a config; evaluations with the same dataset share one object."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, ...], EvaluationSet] = {}

    def open(
        self,
        location: str,
        *,
        split: str,
        subset: Path | None = None,
        columns: TableColumns | None = None,
    ) -> EvaluationSet:
        """Opens the dataset at a path or URL, or a subset of it.

        Args:
            location: path or URL; see eval.datasets.columns.DatasetLocation.
            split: split to open, if the dataset has several.
            subset: `.subset` file that selects samples of Isopair shards.
            columns: names of the columns of a table.

        Raises:
            MissingDatasetError: if there is no dataset.
            InputError: if the dataset is unfinished or empty, or the subset belongs to another.
        """
        columns = columns or TableColumns()
        key = (location, split, str(subset), columns.model_dump_json())
        if key not in self._opened:
            self._opened[key] = open_dataset(location, split=split, subset=subset, columns=columns)
        return self._opened[key]

    def open_section(self, section: EvaluationSection) -> EvaluationSet:
        """Opens the dataset of an evaluation.

        Args:
            section: config section of the evaluation.

        Raises:
            InputError: as in `open`, or if the number of samples is not `expected_items`.
        """
        try:
            dataset = self.open(
                section.dataset,
                split=section.split,
                subset=section.subset,
                columns=section.columns,
            )
        except MissingDatasetError as error:
            advice = f"; {section.how_to_get.strip()}" if section.how_to_get else ""
            raise MissingDatasetError(f"{error}{advice}") from None
        if section.expected_items not in (None, len(dataset)):
            raise InputError(
                f"{section.dataset}: expected {section.expected_items} items (expected_items), "
                f"found {len(dataset)}: metrics would not be comparable with published ones; "
                "fetch the missing items, or change expected_items"
            )
        return dataset


def open_dataset(
    location: str, *, split: str, subset: Path | None, columns: TableColumns
) -> EvaluationSet:
    """Opens a single dataset; arguments and errors are those of `EvaluationSets.open`."""
    if is_url(location) and not is_fetched(location, split=split):
        raise MissingDatasetError(f"{location}: not fetched yet")
    folder = cached_copy(location)
    if (folder / "dataset.json").exists():
        return _kept_samples(folder, subset)
    if subset is not None:
        raise InputError(
            f"{subset}: expected a subset of shards with an index, but {folder} has no index; "
            "create it with python -m data_prep.index_shards"
        )
    if is_table(folder):
        return read_table(folder, columns)
    if holds_tars(folder, split=split):
        return TarDataset(folder, split=split)
    if class_folders_in(folder / split) or class_folders_in(folder):
        return read_class_folders(folder, split=split)
    if not folder.exists():
        raise MissingDatasetError(f"{location}: expected a dataset, found nothing there")
    return _kept_samples(folder, subset)  # raises an error that names the missing file


def _kept_samples(folder: Path, subset: Path | None) -> KeptSamples:
    dataset = KeptSamples(folder, subset=subset)
    if len(dataset) == 0:
        raise InputError(f"{folder}: expected samples to evaluate on, found an empty dataset")
    return dataset
