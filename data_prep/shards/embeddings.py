"""Validation of embeddings in Parquet files against the dataset that they were computed from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from data_prep.errors import InputError

MEDIA_EMBEDDING = "media_embedding"
CAPTION_EMBEDDINGS = "caption_embeddings"


def check_embeddings(
    folder: Path, fingerprint: str, *, columns: Sequence[str] = (MEDIA_EMBEDDING,)
) -> None:
    """Checks that a folder holds the finished embeddings of a dataset.

    Args:
        folder: output folder of python -m eval.embed, or its folder of one view.
        fingerprint: fingerprint of the dataset.
        columns: columns that the files must have.

    Raises:
        InputError: if the embeddings are unfinished, belong to a different dataset, or are those of
            a view that does not have these columns.
    """
    path = folder / "embeddings.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found = record["dataset_fingerprint"]
    except OSError as error:
        raise InputError(
            f"{path}: expected finished embeddings: {error.strerror}; create or finish them "
            "with python -m eval.embed"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: damaged ({error!r}); delete it and run eval.embed") from None
    if found != fingerprint:
        raise InputError(
            f"{folder}: embeddings of a different dataset, with fingerprint {found}; expected "
            f"{fingerprint}; create them with python -m eval.embed"
        )
    missing = [name for name in columns if name not in record.get("columns", columns)]
    if missing:
        raise InputError(
            f"{folder}: expected embeddings with the columns {' and '.join(columns)}, found those "
            f"of the view {record['view']!r} without {' and '.join(missing)}; name a folder of "
            "media embeddings, for caption scores one of media with their captions"
        )
