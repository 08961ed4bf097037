"""Per-sample predictions in Parquet; metrics can be recomputed from them without the model.

    predictions/<evaluation>.parquet                 one row per media item
      one class per item        key, class_name, predicted (null: several classes are tied), hit@1,
                                rank of the true class
      few-shot probes           key, class_name, hit@1 for each number of shots
      several classes           key, class_names, scores [K] in the order of results.json
      association               key (name of the group), cue, Jaccard index
      caption choice            key (of the item, or of all items of the group), its metrics
      captioning                key, references, written caption, exact match, CIDEr-D, sum of the
                                references' loss and number of their tokens
    predictions/<evaluation>.media_to_text.parquet   key, hit@k, rank of the first relevant caption
    predictions/<evaluation>.text_to_media.parquet   key of the caption's item, caption, hit@k, rank
    predictions/<evaluation>.image_to_audio.parquet  and so on: key, hit@k, rank

Characters of <evaluation> other than letters, digits, "_" and "-" are written as %XX. Earlier
versions wrote "_" for them, and kept ".".
Ranks start at 1. Where scores tie, hits and ranks are averaged over all orders of the ties.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.errors import InputError
from data_prep.storage.atomic import write_atomically
from data_prep.storage.file_names import file_name_of

if TYPE_CHECKING:
    from eval.metrics.ranking import QueryRanks
    from eval.tasks.task import Outcome

FOLDER = "predictions"
SUFFIX = r"(\.\w+_to_\w+)?"  # of any file of predictions


def write_predictions(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes the predictions of all evaluations.

    Args:
        folder: results folder.
        outcomes: outcomes of all evaluations.
    """
    for outcome in outcomes:
        for suffix, columns in outcome.task.predictions(outcome).items():
            content = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table(dict(columns)), content, compression="zstd")
            path = predictions_file(folder, outcome.task.name, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())


def rank_columns(ranks: QueryRanks, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns the columns "hit@k" and "rank", one row per query."""
    hits = {f"hit@{k}": ranks.hits_at(k) for k in ks}
    return hits | {"rank": ranks.first_ranks()}


def predictions_file(results: Path, evaluation: str, suffix: str) -> Path:
    """Returns the path of a Parquet file of predictions.

    Args:
        results: folder that `python -m eval.evaluate` wrote.
        evaluation: name of the evaluation.
        suffix: suffix of the file's name, listed in the module's docstring.
    """
    return results / FOLDER / f"{file_name_of(evaluation)}{suffix}.parquet"


def find_predictions(results: Path, evaluation: str, suffix: str) -> Path:
    """Returns the path of a file of predictions to read, also if an earlier version wrote it.

    Args:
        results: folder that `python -m eval.evaluate` wrote.
        evaluation: name of the evaluation.
        suffix: suffix of the file's name, listed in the module's docstring.

    Raises:
        InputError: if an earlier version wrote the predictions of several evaluations to the file,
            because their names differ only in characters that it replaced.
    """
    path = predictions_file(results, evaluation, suffix)
    earlier = path.with_name(f"{_earlier_name(evaluation)}{suffix}.parquet")
    found = path if path.exists() else earlier
    if found != earlier or not earlier.exists():
        return path
    evaluations = json.loads((results / "results.json").read_text())["evaluations"]
    others = []
    for other in evaluations.keys() - {evaluation}:
        match = re.fullmatch(re.escape(_earlier_name(other)) + SUFFIX, earlier.stem)
        if match:
            of_other = predictions_file(results, other, match[1] or "")
            others += [other] if of_other == earlier or not of_other.exists() else []
    if others:
        raise InputError(
            f"{earlier}: an earlier version stored the predictions of {evaluation!r} and "
            f"{min(others)!r} in this file; evaluate again with python -m eval.evaluate"
        )
    return earlier


def _earlier_name(evaluation: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.-]", "_", evaluation)
