"""Measures a checkpoint: zero-shot classification and retrieval, with intervals and a report.

    python -m eval.evaluate configs/eval/demo.yaml
    python -m eval.evaluate configs/eval/demo.yaml checkpoint=runs/mine output=results/mine

1. read the tasks: labels, captions, class names, prompts, all checked   eval.task_readers
2. load the model of the checkpoint                                      eval.embeddings
3. encode media and texts, and score them                                eval.measure
4. write results.json, .md and .csv, and what became of every sample     eval.results, .predictions
5. write report.html                                                     eval.report

Exit status 1 if a figure misses its goal.
"""

from __future__ import annotations

import sys
import time

from data_prep.config_file import run_command
from eval.checkpoint_folder import check_checkpoint_and_output
from eval.config import EvaluateConfig
from eval.task_readers import read_tasks


def run(config: EvaluateConfig) -> None:
    """Evaluates a checkpoint and writes what was found into the output folder."""
    # Imported here: torch and the model libraries take seconds to load, and a dry run needs none.
    from eval.embeddings import load_encoder
    from eval.intervals import Bootstrap
    from eval.measure import check_towers, measure_tasks
    from eval.predictions import write_predictions
    from eval.report import write_report
    from eval.results import (
        refuse_missed_goals,
        results_record,
        scores_csv,
        scores_table,
        write_results,
    )
    from pretrain.checkpoint import find_checkpoint

    start = time.monotonic()
    check_checkpoint_and_output(config.checkpoint, config.output)
    tasks = read_tasks(config)
    checkpoint = find_checkpoint(config.checkpoint)
    encoder = load_encoder(checkpoint, batch_size=config.batch_size, workers=config.workers)
    check_towers(tasks, encoder)
    bootstrap = Bootstrap(config.bootstrap_samples, config.seed)
    outcomes = measure_tasks(tasks, encoder=encoder, bootstrap=bootstrap)
    seconds = time.monotonic() - start
    record = results_record(
        config, outcomes, encoder=encoder, checkpoint=checkpoint, seconds=seconds
    )
    table = scores_table(outcomes)
    write_results(config.output, record, table=table, rows=scores_csv(outcomes))
    write_predictions(config.output, outcomes)
    report = write_report(config, outcomes, record=record, checkpoint=checkpoint)
    print(table)  # noqa: T201
    print(report)  # noqa: T201
    refuse_missed_goals(config, outcomes)


def dry_run(config: EvaluateConfig) -> None:
    """Checks the files of every task, and prints what would be measured."""
    check_checkpoint_and_output(config.checkpoint, config.output)
    for task in read_tasks(config):
        print(task.description())  # noqa: T201


def main() -> int:
    """The command."""
    return run_command(EvaluateConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
