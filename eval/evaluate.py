"""Evaluates a model: zero-shot classification, retrieval and more, with intervals and a report.

    python -m eval.evaluate configs/eval/demo.yaml
    python -m eval.evaluate configs/eval/demo.yaml checkpoint=runs/mine output=results/mine
    torchrun --nproc-per-node 8 -m eval.evaluate configs/eval/demo.yaml

1. read and check labels, captions, class names and prompts           eval.tasks.readers
2. load the model: a checkpoint, or another library's model           eval.models.encoder
3. encode media and texts, distributed over the processes             eval.embeddings.store
4. measure the tasks                                                  eval.tasks.runner
5. write results.json, .md and .csv, and per-sample predictions       eval.report.results
6. write report.html                                                  eval.report.html

The exit status is 1 if a metric misses its goal.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import EvaluateConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(EvaluateConfig, __doc__)

import sys

from eval.models.model_source import find_model
from eval.tasks.readers import read_tasks


def run(config: EvaluateConfig) -> None:
    """Evaluates a model and writes the results into the output folder."""
    # Imported here because torch and the model libraries load slowly, and a dry run needs neither.
    from eval.evaluation import evaluate
    from eval.processes import joined_processes

    with joined_processes():
        evaluate(config)


def dry_run(config: EvaluateConfig) -> None:
    """Checks the files of every task, and prints what would be measured."""
    check_output_folder(config.output, key="output")
    find_model(
        config.checkpoint, architecture=config.open_clip_architecture, weights=config.weights
    )
    found = read_tasks(config.evaluations, skip_missing=config.skip_missing, seed=config.seed)
    for task in found.present:
        say(task.description())
    for name, reason in found.skipped.items():
        say(f"{name}: skipped: {reason}")


def main() -> int:
    """Runs the command."""
    return run_command(EvaluateConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
