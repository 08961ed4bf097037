"""The evaluation of a model, in one or several processes, from config to report."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.command import check_output_folder, say
from data_prep.errors import InputError
from eval.config import EvaluateConfig
from eval.datasets.file_dataset import FileDataset
from eval.datasets.tar_dataset import TarDataset
from eval.embeddings.store import EmbeddingStore
from eval.metrics.intervals import Bootstrap
from eval.models.encoder import Encoder, load_encoder
from eval.processes import wait_for_all
from eval.report.averages import averages_of
from eval.report.html import write_report
from eval.report.predictions import write_predictions
from eval.report.results import (
    check_goals,
    results_record,
    scores_csv,
    scores_table,
    write_results,
)
from eval.tasks.readers import fetch_datasets, read_tasks
from eval.tasks.runner import (
    Embeddings,
    check_fingerprints,
    check_towers,
    compute_tasks,
    encode_tasks,
    measure_tasks,
)
from eval.tasks.task import Outcome, Task
from pretrain.distributed.collectives import on_main_process, rank


def evaluate(config: EvaluateConfig) -> None:
    """Evaluates a model and writes the results into the output folder.

    Every process of the group must call this; the main process measures and writes.

    Raises:
        InputError: if the model, a dataset or a label cannot be used.
        RunError: if a metric misses its goal.
    """
    start = time.monotonic()
    check_output_folder(config.output, key="output")
    on_main_process(lambda: fetch_datasets(config.evaluations))
    found = read_tasks(config.evaluations, skip_missing=config.skip_missing, seed=config.seed)
    if not found.present:
        reasons = "\n".join(found.skipped.values())
        raise InputError(f"expected at least one dataset, found none:\n{reasons}")
    _share_fingerprints(found.present)
    check_fingerprints(found.present)
    encoder = load_encoder(config)
    tasks = [task.for_model(encoder) for task in found.present]
    check_towers(tasks, encoder)
    dims = dims_to_measure(config, encoder)
    store = EmbeddingStore(config.embeddings or config.output / "embeddings", encoder)
    encode_tasks(tasks, store)
    computed = compute_tasks(tasks, encoder)
    wait_for_all()  # every process has encoded its part
    if rank() > 0:
        return
    bootstrap = Bootstrap(config.bootstrap_samples, config.seed)
    embeddings = Embeddings(store, encoder.device, computed=computed)
    outcomes = measure_tasks(tasks, embeddings, bootstrap=bootstrap, matryoshka_dims=dims)
    seconds = time.monotonic() - start
    record = results_record(
        outcomes,
        averages=averages_of(outcomes, config.evaluations),
        encoder=encoder,
        long_clips=config.long_clips,
        bootstrap=bootstrap,
        skipped=found.skipped,
        seconds=seconds,
        config=json.loads(config.model_dump_json()),
    )
    _write(config.output, outcomes, record)
    check_goals(config.evaluations, outcomes)


def dims_to_measure(config: EvaluateConfig, encoder: Encoder) -> list[int]:
    """Returns the numbers of first elements of the embeddings to measure as well.

    Raises:
        InputError: if one of them is not below the width of the embeddings.
    """
    if config.matryoshka_dims is None:
        return list(encoder.matryoshka_dims)
    for dim in config.matryoshka_dims:
        if dim >= encoder.embed_dim:
            raise InputError(
                f"matryoshka_dims: expected numbers below {encoder.embed_dim}, the width of the "
                f"model's embeddings, found {dim}; all numbers are always measured"
            )
    return sorted(set(config.matryoshka_dims))


def _share_fingerprints(tasks: Sequence[Task]) -> None:
    """Computes the fingerprint of each dataset in one process, since it reads the whole dataset."""
    for task in tasks:
        for source in task.media_sets:
            dataset = source.dataset
            fingerprint = on_main_process(lambda dataset=dataset: dataset.fingerprint)
            if isinstance(dataset, (TarDataset, FileDataset)):
                dataset.fingerprint = fingerprint


def _write(output: Path, outcomes: Sequence[Outcome], record: dict[str, Any]) -> None:
    table = scores_table(outcomes, record)
    write_predictions(output, outcomes)
    report = write_report(output, outcomes, record=record)
    write_results(output, record, table=table, rows=scores_csv(outcomes))
    say(table)
    say(report)
