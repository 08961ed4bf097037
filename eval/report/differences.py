"""Differences between two results of one evaluation, sample by sample, with paired intervals.

Both results are measured on the same samples, so the intervals are those of per-sample differences.
This distinguishes models whose individual intervals overlap widely.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from data_prep.errors import InputError
from eval.metrics.intervals import Bootstrap, Interval, no_interval, paired_interval
from eval.report.predictions import find_predictions

NUM_FLIPPED = 20  # samples listed by key
# Columns that identify a query and its relevant candidates
QUERY_COLUMNS = ("key", "caption", "cue", "class_name", "class_names")


@dataclass(frozen=True)
class Difference:
    """Difference of one metric between two results."""

    evaluation: str
    metric: str
    baseline: float
    value: float
    difference: float  # value - baseline
    low: float | None  # 95 % interval of the difference; None: no interval can be trusted
    high: float | None
    interval: str  # method of the interval; "none: " and the reason if there is none
    num_queries: int
    num_better: int  # number of queries that are better than in the baseline
    num_worse: int
    better: list[str]  # keys of the first samples with a better query
    worse: list[str]

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes 0."""
        if self.low is None or self.high is None:
            return False
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class ResultPair:
    """One evaluation in two results folders.

    Args:
        evaluation: name of the evaluation.
        record: record of the evaluation in the first results.json.
        folders: both results folders.
        bootstrap: settings of the intervals.
    """

    evaluation: str
    record: dict[str, Any]
    folders: tuple[Path, Path]
    bootstrap: Bootstrap

    def tables(self, suffix: str = "") -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        """Reads the predictions of both results as {column: values}.

        Raises:
            InputError: if predictions are missing, or belong to other queries.
        """
        paths = [find_predictions(folder, self.evaluation, suffix) for folder in self.folders]
        first, second = (_read_predictions(path) for path in paths)
        for column in QUERY_COLUMNS:
            if first.get(column) != second.get(column):
                raise InputError(
                    f"{paths[1]}: expected the column {column} of {paths[0]}, in the same order, "
                    "found other values; evaluate both models on the same dataset with the same "
                    "settings"
                )
        return first, second

    def mean_differences(
        self, metric_of_column: Mapping[str, str], suffix: str = ""
    ) -> Iterator[Difference]:
        """Yields the differences of metrics that are column means; items are clusters.

        Args:
            metric_of_column: column of the predictions -> metric that is its mean.
            suffix: suffix of the predictions file.

        Raises:
            InputError: if predictions are missing.
        """
        first, second = self.tables(suffix)
        keys = first["key"]
        _, clusters = np.unique(keys, return_inverse=True)
        for column, metric in metric_of_column.items():
            values = (np.array(first[column]), np.array(second[column]))
            is_rank = column == "rank"
            # A mean of ranks depends on a few large ones.
            interval = (
                no_interval("of ranks")
                if is_rank
                else paired_interval(values[1] - values[0], clusters=clusters)
            )
            yield self.difference(
                metric, values=values, interval=interval, keys=keys, is_rank=is_rank
            )

    def rank_differences(self, direction: str) -> Iterator[Difference]:
        """Yields the differences of recall@k and mean rank for one retrieval direction.

        Args:
            direction: prefix of the metrics, and suffix of the predictions file.

        Raises:
            InputError: if predictions are missing.
        """
        suffix = f".{direction}"
        first, second = self.tables(suffix)
        metric_of_column = {
            column: f"{direction}_{column.replace('hit', 'recall')}"
            for column in first
            if column.startswith("hit@") and column in second  # both may have other depths
        }
        metric_of_column["rank"] = f"{direction}_mean_rank"
        yield from self.mean_differences(metric_of_column, suffix)

    def difference(
        self,
        metric: str,
        *,
        values: tuple[np.ndarray, np.ndarray],
        interval: Interval,
        keys: Sequence[str],
        is_rank: bool = False,
    ) -> Difference:
        """Builds the difference of a metric that is a mean over queries.

        Args:
            metric: name of the metric.
            values: [queries] values of the baseline, and of the other result.
            interval: 95 % interval of the difference.
            keys: [queries] key of each query's sample.
            is_rank: whether lower values are better.
        """
        gains = values[1] - values[0]
        better = gains < 0 if is_rank else gains > 0
        worse = (gains != 0) & ~better
        return Difference(
            evaluation=self.evaluation,
            metric=metric,
            baseline=float(values[0].mean()),
            value=float(values[1].mean()),
            difference=float(gains.mean()),
            low=interval[0],
            high=interval[1],
            interval=interval[2],
            num_queries=len(gains),
            num_better=int(better.sum()),
            num_worse=int(worse.sum()),
            better=_first_keys(keys, better),
            worse=_first_keys(keys, worse),
        )


def _read_predictions(path: Path) -> dict[str, list[Any]]:
    if not path.exists():
        raise InputError(
            f"{path}: expected predictions; evaluate again with python -m eval.evaluate"
        )
    table = pyarrow.parquet.read_table(path)
    return {column: table[column].to_pylist() for column in table.column_names}


def _first_keys(keys: Sequence[str], wanted: np.ndarray) -> list[str]:
    return list(dict.fromkeys(keys[index] for index in np.flatnonzero(wanted)))[:NUM_FLIPPED]
