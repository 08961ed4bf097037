"""Measures a model: zero-shot classification, retrieval and more, with intervals and a report.

    python -m eval.evaluate configs/eval/demo.yaml
    python -m eval.evaluate configs/eval/demo.yaml checkpoint=runs/mine output=results/mine
    torchrun --nproc-per-node 8 -m eval.evaluate configs/eval/demo.yaml

1. read the tasks: labels, captions, class names, prompts, all checked   eval.task_readers
2. load the model, of ours or another library's                          eval.encoder
3. encode media and texts: each process its share, each item once        eval.embedding_store
4. score them                                                            eval.measure
5. write results.json, .md and .csv, and what became of every sample     eval.results, .predictions
6. write report.html                                                     eval.report

Exit status 1 if a figure misses its goal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from data_prep.config_file import InputError, check_output_folder, run_command
from eval.config import EvaluateConfig
from eval.model_source import find_model
from eval.task_readers import fetch_datasets, read_tasks

if TYPE_CHECKING:
    from eval.measure import Outcome


def run(config: EvaluateConfig) -> None:
    """Evaluates a model and writes what was found into the output folder."""
    # Imported here: torch and the model libraries take seconds to load, and a dry run needs none.
    from eval.processes import joined_processes

    with joined_processes():
        _evaluate(config)


def _evaluate(config: EvaluateConfig) -> None:
    from eval.embedding_store import EmbeddingStore
    from eval.encoder import load_encoder
    from eval.intervals import Bootstrap
    from eval.measure import Embeddings, check_towers, encode_tasks, measure_tasks
    from eval.processes import wait_for_all
    from eval.results import results_record
    from pretrain.gather import on_main_process, rank

    start = time.monotonic()
    check_output_folder(config.output, key="output")
    on_main_process(lambda: fetch_datasets(config))
    found = read_tasks(config)
    if not found.present:
        raise InputError("none of the datasets is there:\n" + "\n".join(found.skipped.values()))
    encoder = load_encoder(config)
    check_towers(found.present, encoder)
    store = EmbeddingStore(config.embeddings or config.output / "embeddings", encoder)
    encode_tasks(found.present, store)
    wait_for_all()  # every process has made its share
    if rank() > 0:
        return
    bootstrap = Bootstrap(config.bootstrap_samples, config.seed)
    embeddings = Embeddings(store, encoder.device)
    outcomes = measure_tasks(found.present, embeddings, bootstrap=bootstrap)
    seconds = time.monotonic() - start
    record = results_record(
        config, outcomes, encoder=encoder, skipped=found.skipped, seconds=seconds
    )
    _write(config, outcomes, record)


def _write(config: EvaluateConfig, outcomes: Sequence[Outcome], record: dict[str, Any]) -> None:
    from eval.predictions import write_predictions
    from eval.report import write_report
    from eval.results import refuse_missed_goals, scores_csv, scores_table, write_results

    table = scores_table(outcomes, record)
    write_results(config.output, record, table=table, rows=scores_csv(outcomes))
    write_predictions(config.output, outcomes)
    print(table)  # noqa: T201
    print(write_report(config, outcomes, record=record))  # noqa: T201
    refuse_missed_goals(config, outcomes)


def dry_run(config: EvaluateConfig) -> None:
    """Checks the files of every task, and prints what would be measured."""
    check_output_folder(config.output, key="output")
    find_model(config.checkpoint, architecture=config.open_clip_architecture)
    found = read_tasks(config)
    for task in found.present:
        print(task.description())  # noqa: T201
    for name, reason in found.skipped.items():
        print(f"{name}: left out: {reason}")  # noqa: T201


def main() -> int:
    """The command."""
    return run_command(EvaluateConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
