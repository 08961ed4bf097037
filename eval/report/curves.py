"""TensorBoard curves of evaluation metrics over the checkpoints of a run.

Every start rewrites all curves from the results. A step is thus neither missing nor repeated if
eval.watch was killed between writing results and curves.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class EvaluationCurves:
    """Curves in <run>/tensorboard/evaluation.

    Args:
        run_folder: run folder.
        output: folder with one results folder per step.
    """

    def __init__(self, run_folder: Path, output: Path) -> None:
        folder = run_folder / "tensorboard" / "evaluation"
        shutil.rmtree(folder, ignore_errors=True)
        self.writer = SummaryWriter(str(folder))
        for results in sorted(output.glob("step_*/results.json")):
            self.add(results.parent)

    def add(self, output: Path) -> None:
        """Adds the metrics of one step's results."""
        record = json.loads((output / "results.json").read_text())
        scores = {
            f"{name}/{metric}": score
            for name, each in record["evaluations"].items()
            for metric, score in each["scores"].items()
        }
        scores |= {f"averages/{name}": score for name, score in record["averages"].items()}
        for name, score in scores.items():
            self.writer.add_scalar(name, score["value"], record["checkpoint"]["step"])
        self.writer.flush()
