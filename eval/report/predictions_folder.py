"""Where the predictions of an evaluation are. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = "predictions"


def predictions_file(results: Path, evaluation: str, suffix: str) -> Path:
    """The Parquet of an evaluation.

    Args:
        results: folder that `python -m eval.evaluate` wrote.
        evaluation: its name.
        suffix: which of its files, see eval.report.predictions.
    """
    return results / FOLDER / f"{re.sub(r'[^a-zA-Z0-9_.-]', '_', evaluation)}{suffix}.parquet"
