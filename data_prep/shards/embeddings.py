"""Validation of embeddings in Parquet files against the dataset that they were computed from."""

from __future__ import annotations

import json
from pathlib import Path

from data_prep.errors import InputError


def check_embeddings(folder: Path, fingerprint: str) -> None:
    """Checks that a folder holds the finished embeddings of a dataset.

    Args:
        folder: output folder of python -m eval.embed.
        fingerprint: fingerprint of the dataset.

    Raises:
        InputError: if the embeddings are unfinished, or belong to a different dataset.
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
