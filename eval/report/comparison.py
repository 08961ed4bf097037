"""Two results of the same evaluations, compared sample by sample.

Both saw the same samples, so their differences are resampled, not their metrics: that tells models
apart whose own intervals overlap widely.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet

from data_prep.errors import InputError
from eval.metrics.intervals import (
    Bootstrap,
    bootstrap_interval,
    percentile_interval,
    weighted_mean,
)
from eval.report.predictions import predictions_file

NUM_FLIPPED = 20  # keys of samples that are named
# What must be equal, besides the samples, for metrics to be of the same thing.
CONDITIONS = {
    "zero_shot_classification": ("class_names",),
    "linear_probe": ("class_names", "train_fingerprint", "validation_fingerprint"),
    "nearest_neighbours": ("class_names", "train_fingerprint", "num_neighbours", "temperature"),
    "few_shot": ("class_names", "train_fingerprint", "l2", "shots", "num_draws", "seed"),
    "multi_label_classification": ("class_names",),
    "media_retrieval": ("other_fingerprint", "num_right_pairs"),
    "association": ("cues_sha256",),
    "caption_choice": ("captions_sha256", "num_groups"),
    "retrieval": ("equal_captions", "num_captions", "num_distractor_captions"),
}


@dataclass(frozen=True)
class Difference:
    """How a metric of one result differs from that of another."""

    evaluation: str
    metric: str
    baseline: float
    value: float
    difference: float  # value - baseline
    low: float  # 95 % interval of the difference
    high: float
    num_queries: int
    num_better: int  # queries
    num_worse: int
    better: list[str]  # keys of the first samples with a query that is better
    worse: list[str]

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


def read_results(folder: Path) -> dict[str, Any]:
    """What `python -m eval.evaluate` wrote into a folder.

    Raises:
        InputError: there is nothing.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected the results of python -m eval.evaluate: {error}"
        ) from None
    for record in results["evaluations"].values():
        if "strength" in record:  # the key's name in results of older versions
            record["l2"] = record.pop("strength")
    return results


def shared_evaluations(baseline: Path, other: Path) -> dict[str, dict[str, Any]]:
    """Name -> record in the baseline of the evaluations that both have, of the same samples.

    Raises:
        InputError: there are none, or those of one name are not of the same samples.
    """
    first, second = (read_results(folder)["evaluations"] for folder in (baseline, other))
    shared = {name: record for name, record in first.items() if name in second}
    if not shared:
        raise InputError(
            f"{other}: expected evaluations named as in {baseline} ({', '.join(first)}); found "
            f"{', '.join(second)}"
        )
    for name in shared:
        keys = ("task", *CONDITIONS.get(first[name]["task"], ()))
        pairs = [(key, first[name].get(key), second[name].get(key)) for key in keys]
        pairs.append(
            ("fingerprint", *(each[name]["dataset"]["fingerprint"] for each in (first, second)))
        )
        for key, ours, theirs in pairs:
            if ours != theirs:
                raise InputError(
                    f"evaluation {name}: {key} is {_shortened(ours)} in {baseline} and "
                    f"{_shortened(theirs)} in {other}: they are not of the same thing; evaluate "
                    "both alike, or give the evaluations different names"
                )
    return shared


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def compare(baseline: Path, other: Path, *, bootstrap: Bootstrap) -> list[Difference]:
    """The differences of all metrics that are means over queries.

    Args:
        baseline: folder of results.
        other: likewise.
        bootstrap: of the intervals.

    Raises:
        InputError: see `shared_evaluations`; or predictions are missing.
    """
    return [
        difference
        for name, record in shared_evaluations(baseline, other).items()
        for difference in _differences(name, record, (baseline, other), bootstrap)
    ]


def _differences(
    name: str, record: dict[str, Any], folders: tuple[Path, Path], bootstrap: Bootstrap
) -> Iterator[Difference]:
    def read(suffix: str = "") -> list[dict[str, Any]]:
        return [_read(folder, name, suffix) for folder in folders]

    if record["task"] in ("zero_shot_classification", "linear_probe", "nearest_neighbours"):
        yield from _mean_differences(name, read(), {"hit@1": "top_1_accuracy"}, bootstrap)
    elif record["task"] == "few_shot":
        metrics = {f"hit@1_{k}_shot": f"top_1_accuracy@{k}_shot" for k in record["shots"]}
        yield from _mean_differences(name, read(), metrics, bootstrap)
    elif record["task"] in ("caption_choice", "association"):
        metrics = {metric: metric for metric in record["scores"]}
        yield from _mean_differences(name, read(), metrics, bootstrap)
    elif record["task"] == "multi_label_classification":
        yield _precision_difference(name, read(), record["class_names"], bootstrap)
    else:
        for direction in record["directions"]:
            tables = read(f".{direction}")
            metrics = {
                column: f"{direction}_{column.replace('hit', 'recall')}"
                for column in tables[0]
                if column.startswith("hit@")
            } | {"rank": f"{direction}_mean_rank"}
            yield from _mean_differences(name, tables, metrics, bootstrap)


def _read(folder: Path, name: str, suffix: str) -> dict[str, Any]:
    path = predictions_file(folder, name, suffix)
    if not path.exists():
        raise InputError(
            f"{path}: expected predictions; evaluate again with python -m eval.evaluate"
        )
    table = pyarrow.parquet.read_table(path)
    return {column: table[column].to_pylist() for column in table.column_names}


def _mean_differences(
    name: str, tables: list[dict[str, Any]], metrics: dict[str, str], bootstrap: Bootstrap
) -> Iterator[Difference]:
    """Of the means of columns, resampled by media item."""
    first, second = tables
    keys = first["key"]
    _, clusters = np.unique(keys, return_inverse=True)
    for column, metric in metrics.items():
        ours, theirs = (np.array(each[column]) for each in (first, second))
        gains = theirs - ours
        low, high = bootstrap_interval(
            gains, clusters=clusters, statistic=weighted_mean, bootstrap=bootstrap
        )
        better = gains < 0 if column == "rank" else gains > 0
        worse = (gains != 0) & ~better
        yield Difference(
            evaluation=name,
            metric=metric,
            baseline=float(ours.mean()),
            value=float(theirs.mean()),
            difference=float(gains.mean()),
            low=low,
            high=high,
            num_queries=len(gains),
            num_better=int(better.sum()),
            num_worse=int(worse.sum()),
            better=_first_keys(keys, better),
            worse=_first_keys(keys, worse),
        )


def _first_keys(keys: list[str], wanted: np.ndarray) -> list[str]:
    return list(dict.fromkeys(keys[place] for place in np.flatnonzero(wanted)))[:NUM_FLIPPED]


def _precision_difference(
    name: str, tables: list[dict[str, Any]], class_names: list[str], bootstrap: Bootstrap
) -> Difference:
    """Of mean average precision: both are taken over the same draws of items."""
    from eval.metrics.multi_label import average_precisions, resampled_precisions

    first, second = tables
    of_class = np.array([[k in found for found in first["class_names"]] for k in class_names])
    present = of_class.any(axis=1)
    values, resampled = [], []
    for each in (first, second):
        scores = np.array(each["scores"], dtype=np.float32).T[present]  # [K, Q]
        values.append(average_precisions(scores, of_class[present]))
        resampled.append(resampled_precisions(scores, of_class[present], bootstrap))
    low, high = percentile_interval(np.nanmean(resampled[1] - resampled[0], axis=0))
    gains = values[1] - values[0]
    names = [
        class_name for class_name, is_here in zip(class_names, present, strict=True) if is_here
    ]
    return Difference(
        evaluation=name,
        metric="mean_average_precision",
        baseline=float(values[0].mean()),
        value=float(values[1].mean()),
        difference=float(gains.mean()),
        low=low,
        high=high,
        num_queries=len(gains),
        num_better=int((gains > 0).sum()),
        num_worse=int((gains < 0).sum()),
        better=_first_keys(names, gains > 0),
        worse=_first_keys(names, gains < 0),
    )
