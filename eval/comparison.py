"""Comparison of two results: the evaluations that both contain, and their differences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from data_prep.errors import InputError
from eval.metrics.intervals import Bootstrap
from eval.report.differences import Difference, ResultPair
from eval.tasks.task import Task, task_types


def read_results(folder: Path) -> dict[str, Any]:
    """Reads the results.json that `python -m eval.evaluate` wrote into a folder.

    Raises:
        InputError: if there is no such file.
    """
    path = folder / "results.json"
    try:
        results = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected the results of python -m eval.evaluate: {error}"
        ) from None
    for record in results["evaluations"].values():
        if "strength" in record:  # name of the key in older versions
            record["l2"] = record.pop("strength")
    return results


def shared_evaluations(baseline: Path, other: Path) -> dict[str, dict[str, Any]]:
    """Returns the evaluations that both results contain: {name: record of the baseline}.

    Raises:
        InputError: if there are none, or if samples or settings of an evaluation differ.
    """
    first, second = (read_results(folder)["evaluations"] for folder in (baseline, other))
    shared = {name: record for name, record in first.items() if name in second}
    if not shared:
        raise InputError(
            f"{other}: expected evaluations of {baseline} ({', '.join(first)}); found "
            f"{', '.join(second)}"
        )
    for name, record in shared.items():
        task = _task_of(record, f"{baseline}: evaluation {name}")
        keys = ("task", *task.conditions)
        # Older results lack some keys, and cannot be compared with results that have them.
        found = [(key, record.get(key), second[name].get(key)) for key in keys]
        found.append(
            ("fingerprint", *(each[name]["dataset"]["fingerprint"] for each in (first, second)))
        )
        for key, value, other_value in found:
            if value != other_value:
                raise InputError(
                    f"evaluation {name}: {key} is {_shortened(value)} in {baseline} and "
                    f"{_shortened(other_value)} in {other}: they cannot be compared; evaluate both "
                    "with the same settings, or give the evaluations different names"
                )
    return shared


def _task_of(record: dict[str, Any], where: str) -> type[Task]:
    known = task_types()
    if record["task"] not in known:
        raise InputError(
            f"{where}: expected one of the tasks {', '.join(sorted(known))}; found "
            f"{record['task']!r}"
        )
    return known[record["task"]]


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else f"{text[:76]} ..."


def compare(baseline: Path, other: Path, *, bootstrap: Bootstrap) -> list[Difference]:
    """Computes the differences of all metrics that are means over queries.

    Args:
        baseline: folder of the baseline's results.
        other: folder of the results to compare with the baseline.
        bootstrap: settings of the intervals.

    Raises:
        InputError: see `shared_evaluations`; or if predictions are missing.
    """
    differences = []
    for name, record in shared_evaluations(baseline, other).items():
        pair = ResultPair(name, record, (baseline, other), bootstrap)
        differences += _task_of(record, str(baseline)).differences(pair)
    return differences
