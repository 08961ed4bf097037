"""What became of every sample, in Parquet: figures can be taken from it again without the model.

    predictions/<evaluation>.parquet                 a row per media item
      one class per item        key, class_name, predicted, hit@1, rank of the true class
      several classes           key, class_names, scores [K] in the order of results.json
    predictions/<evaluation>.media_to_text.parquet   key, hit@k, rank of the first right caption
    predictions/<evaluation>.text_to_media.parquet   key of the caption's item, caption, hit@k, rank

Ranks begin at 1. With ties, hits and ranks are the mean over all orders.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.shard_format import write_atomically
from eval.measure import Outcome
from eval.predictions_folder import predictions_file
from eval.ranking import QueryRanks, cosine_scores
from eval.tasks import ClassificationTask, MultiLabelTask


def write_predictions(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Writes the files of all evaluations.

    Args:
        folder: of the results.
        outcomes: of all evaluations.
    """
    for outcome in outcomes:
        for suffix, columns in predictions_of(outcome).items():
            content = io.BytesIO()
            pyarrow.parquet.write_table(pyarrow.table(dict(columns)), content, compression="zstd")
            path = predictions_file(folder, outcome.task.name, suffix)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content.getvalue())


def predictions_of(outcome: Outcome) -> dict[str, Mapping[str, Any]]:
    """Suffix of the file's name -> its columns."""
    task, result = outcome.task, outcome.result
    if isinstance(task, ClassificationTask):
        return {
            "": {
                "key": task.keys,
                "class_name": [task.class_names[place] for place in task.targets],
                "predicted": [task.class_names[place] for place in result.predictions],
                "hit@1": result.ranks.hits_at(1),
                "rank": result.ranks.first_ranks(),
            }
        }
    if isinstance(task, MultiLabelTask):
        scores = cosine_scores(outcome.media_embeddings, outcome.text_embeddings)  # [Q, K]
        return {
            "": {
                "key": task.keys,
                "class_names": [
                    [task.class_names[place] for place in row.nonzero()[0]]
                    for row in task.is_of_class
                ],
                "scores": list(scores.numpy()),
            }
        }
    return {
        ".media_to_text": {"key": task.keys, **_ranks(result.media_to_text, task.ks)},
        ".text_to_media": {
            "key": [task.keys[item] for item in task.media_of_text],
            "caption": task.captions,
            **_ranks(result.text_to_media, task.ks),
        },
    }


def _ranks(ranks: QueryRanks, ks: Sequence[int]) -> dict[str, np.ndarray]:
    hits = {f"hit@{k}": ranks.hits_at(k) for k in ks}
    return hits | {"rank": ranks.first_ranks()}
