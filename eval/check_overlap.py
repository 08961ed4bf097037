"""Finds the items of an evaluation set that a model may have seen in training.

    python -m eval.check_overlap configs/eval/overlap.yaml
    python -m eval.check_overlap configs/eval/overlap.yaml 'train=[datasets/a, datasets/b]'

1. key       same file name or uid, even if the bytes differ
2. content   same bytes of the media file
3. near      re-encoded, rescaled, mirrored, cropped or trimmed media, found by fingerprints
4. caption   same words, ignoring case and whitespace

Writes overlap.parquet with one row per match, and overlap.json with the counts. If the evaluation
set consists of Isopair shards, also writes clean.subset for the `subset` setting of eval.evaluate.
To remove such items from the training data instead, use data_prep.find_duplicates with `against`.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from eval.config import OverlapConfig

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(OverlapConfig, __doc__)

import json
import sys
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from data_prep.config_file import fixed_values
from data_prep.shards.subset import KeptSamples, Subset
from data_prep.storage.atomic import write_atomically
from eval.datasets.datasets import EvaluationSet, open_dataset
from eval.datasets.overlap import METHODS, Overlap, find_overlap


def run(config: OverlapConfig) -> None:
    """Finds items of the evaluation set in training datasets, and writes the matches."""
    check_output_folder(config.output, key="output")
    dataset = _open(config)
    overlap = find_overlap(
        dataset,
        config.train,
        near_media=config.near_media,
        keys=config.keys,
        captions=config.captions,
        workers=config.workers,
    )
    config.output.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(overlap.rows(), schema=Overlap.SCHEMA),
        config.output / "overlap.parquet",
    )
    record = overlap.counts() | {
        "dataset": str(dataset.folder),
        "fingerprint": dataset.fingerprint,
        "train": [str(folder) for folder in config.train],
    }
    content = json.dumps(record, indent=2).encode() + b"\n"
    write_atomically(config.output / "overlap.json", content)
    if isinstance(dataset, KeptSamples):
        preparation = {"command": "check_overlap", "config": fixed_values(config)}
        subset = _clean_subset(dataset, overlap, preparation=preparation)
        subset.write(config.output / "clean.subset")
    for method in METHODS:
        say(f"{method}: {record['num_items'][method]:,} of {len(dataset):,} items")
    say(f"any: {record['num_items']['any']:,}; {config.output}/overlap.parquet")


def _open(config: OverlapConfig) -> EvaluationSet:
    return open_dataset(
        config.dataset, split=config.split, subset=config.subset, columns=config.columns
    )


def _clean_subset(dataset: KeptSamples, overlap: Overlap, *, preparation: dict[str, Any]) -> Subset:
    kept = np.zeros(len(dataset.dataset), dtype=bool)
    kept[dataset.ordinals_of(np.flatnonzero(~overlap.is_seen()))] = True
    return Subset.from_bitmap(dataset.info, kept, preparation=preparation)


def dry_run(config: OverlapConfig) -> None:
    """Checks that all datasets can be read, and prints their sizes."""
    check_output_folder(config.output, key="output")
    dataset = _open(config)
    say(f"{dataset.folder}: {len(dataset):,} {dataset.info.media} items")
    for folder in config.train:
        samples = KeptSamples(folder, subset=None)
        say(f"{folder}: {len(samples):,} {samples.info.media} samples")


def main() -> int:
    """Runs the command."""
    return run_command(OverlapConfig, run=run, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
