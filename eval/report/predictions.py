"""What became of every sample, in Parquet: metrics can be taken from it again without the model.

    predictions/<evaluation>.parquet                 a row per media item
      one class per item        key, class_name, predicted, hit@1, rank of the true class
      few-shot probes           key, class_name, hit@1 after each number of shots
      several classes           key, class_names, scores [K] in the order of results.json
      association               name of the group as key, cue, Jaccard index
      caption choice            key of the item, or keys of the group; its metrics
    predictions/<evaluation>.media_to_text.parquet   key, hit@k, rank of the first right caption
    predictions/<evaluation>.text_to_media.parquet   key of the caption's item, caption, hit@k, rank
    predictions/<evaluation>.image_to_audio.parquet  and so on: key, hit@k, rank

Ranks begin at 1. With ties, hits and ranks are the mean over all orders.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.storage.atomic import write_atomically
from eval.metrics.ranking import QueryRanks, cosine_scores
from eval.tasks.runner import Outcome
from eval.tasks.task import (
    AssociationTask,
    CaptionChoiceTask,
    FewShotTask,
    MediaRetrievalTask,
    MultiLabelTask,
    SingleLabelTask,
)

FOLDER = "predictions"


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
    if isinstance(task, FewShotTask):
        hits = {f"hit@1_{shots}_shot": hits for shots, hits in result.hits.items()}
        return {"": {"key": task.keys, "class_name": _class_names(task), **hits}}
    if isinstance(task, SingleLabelTask):
        return {
            "": {
                "key": task.keys,
                "class_name": _class_names(task),
                "predicted": [task.class_labels[place] for place in result.predictions],
                "hit@1": result.ranks.hits_at(1),
                "rank": result.ranks.first_ranks(),
            }
        }
    if isinstance(task, MultiLabelTask):
        scores = cosine_scores(outcome.media_embeddings, outcome.other_embeddings)  # [Q, K]
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
    if isinstance(task, AssociationTask):
        return {"": {"key": list(task.groups), "cue": task.cues, "jaccard": result.jaccard}}
    if isinstance(task, CaptionChoiceTask):
        keys = task.keys
        if task.groups is not None:
            keys = [" ".join(task.keys[item] for item in indices) for indices in task.groups]
        return {"": {"key": keys, **result.hits}}
    if isinstance(task, MediaRetrievalTask):
        ranks = (result.media_to_text, result.text_to_media)
        keys_of = (task.keys, task.other.keys)
        return {
            f".{direction}": {"key": keys, **_ranks(each, task.ks)}
            for direction, keys, each in zip(task.directions, keys_of, ranks, strict=True)
        }
    return {
        ".media_to_text": {"key": task.keys, **_ranks(result.media_to_text, task.ks)},
        ".text_to_media": {
            "key": [task.keys[item] for item in task.media_of_text],
            "caption": task.captions,
            **_ranks(result.text_to_media, task.ks),
        },
    }


def _class_names(task: SingleLabelTask) -> list[str]:
    return [task.class_labels[place] for place in task.targets]


def _ranks(ranks: QueryRanks, ks: Sequence[int]) -> dict[str, np.ndarray]:
    hits = {f"hit@{k}": ranks.hits_at(k) for k in ks}
    return hits | {"rank": ranks.first_ranks()}


def predictions_file(results: Path, evaluation: str, suffix: str) -> Path:
    """The Parquet of an evaluation.

    Args:
        results: folder that `python -m eval.evaluate` wrote.
        evaluation: its name.
        suffix: which of its files, see eval.report.predictions.
    """
    return results / FOLDER / f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', evaluation)}{suffix}.parquet"
