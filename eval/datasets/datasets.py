"""Opens the dataset of an evaluation, whichever form it has. Needs no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import InputError
from data_prep.shards.subset import KeptSamples
from data_prep.storage.remote_file import is_url
from eval.datasets.columns import TableColumns
from eval.datasets.download import cached_copy, is_fetched
from eval.datasets.file_dataset import (
    TABLE_SUFFIXES,
    FileDataset,
    class_folders_in,
    read_class_folders,
    read_table,
)
from eval.datasets.tar_dataset import TarDataset, holds_tars

if TYPE_CHECKING:
    from eval.tasks.task import EvaluationSection

EvaluationSet = KeptSamples | TarDataset | FileDataset


class MissingDatasetError(InputError):
    """There is nothing at an evaluation's path."""


class EvaluationSets:
    """The datasets of a config: each is opened, and later encoded, once for all evaluations."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, ...], EvaluationSet] = {}

    def open(
        self,
        place: str,
        *,
        split: str,
        subset: Path | None = None,
        columns: TableColumns | None = None,
    ) -> EvaluationSet:
        """The dataset at a path or URL, or what a subset keeps of it.

        Args:
            place: see eval.datasets.columns.DatasetLocation.
            split: of sets that have several.
            subset: of shards of ours.
            columns: of a table.

        Raises:
            MissingDatasetError: nothing is there.
            InputError: it is unfinished or empty, or the subset is of another dataset.
        """
        columns = columns or TableColumns()
        key = (place, split, str(subset), columns.model_dump_json())
        if key not in self._opened:
            self._opened[key] = open_dataset(place, split=split, subset=subset, columns=columns)
        return self._opened[key]

    def of_section(self, name: str, section: EvaluationSection) -> EvaluationSet:
        """The samples that an evaluation measures.

        Args:
            name: of the evaluation.
            section: of the config.

        Raises:
            InputError: as `open`; or there are more or fewer than expected.
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
                f"found {len(dataset)}: metrics would not be comparable with anybody's; fetch "
                "what is missing, or set expected_items to what you have"
            )
        return dataset


def open_dataset(
    place: str, *, split: str, subset: Path | None, columns: TableColumns
) -> EvaluationSet:
    """See `EvaluationSets.open`."""
    if is_url(place) and not is_fetched(place, split=split):
        raise MissingDatasetError(f"{place}: not fetched yet")
    folder = cached_copy(place)
    if (folder / "dataset.json").exists():
        return _kept_samples(folder, subset)
    if subset is not None:
        raise InputError(
            f"{subset}: a subset is of shards with an index, and {folder} holds none; "
            "make one with python -m data_prep.index_shards"
        )
    if folder.suffix in TABLE_SUFFIXES and folder.is_file():
        return read_table(folder, columns)
    if holds_tars(folder, split=split):
        return TarDataset(folder, split=split)
    if class_folders_in(folder / split) or class_folders_in(folder):
        return read_class_folders(folder, split=split)
    if not folder.exists():
        raise MissingDatasetError(f"{place}: expected a dataset, found nothing there")
    return _kept_samples(folder, subset)  # says what it misses


def _kept_samples(folder: Path, subset: Path | None) -> KeptSamples:
    dataset = KeptSamples(folder, subset=subset)
    if len(dataset) == 0:
        raise InputError(f"{folder}: expected samples to evaluate on, found an empty dataset")
    return dataset
