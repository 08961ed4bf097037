"""Finds duplicates within datasets, between datasets, and between datasets and evaluation sets.

    python -m data_prep.find_duplicates configs/data_prep/duplicates.yaml
    python -m data_prep.find_duplicates configs/data_prep/duplicates.yaml 'against=[datasets/test]'

1. exact           equal bytes of the media
2. near_media      re-encoded, rescaled, mirrored or trimmed media, found by their fingerprints
3. near_captions   nearly equal captions; the media may differ
4. semantic        semantically equal media, found by the embeddings of python -m eval.embed

Each method searches the samples that the previous methods kept, and keeps one sample per group. A
group with evaluation samples (`against`) keeps only these. Similarity is chained: see
data_prep.dedup.groups. The output folder contains:

- duplicates.parquet, for `drop` of make_subset
- a .subset file of every dataset, for training
- report.html

The datasets are not changed.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from data_prep.config import FindDuplicates

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(FindDuplicates, __doc__)

import logging
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from data_prep.config_file import fixed_values, to_yaml
from data_prep.dedup.duplicate_table import write_table
from data_prep.dedup.groups import GroupedSamples, group_samples
from data_prep.dedup.joined_datasets import JoinedDatasets, number_column
from data_prep.dedup.search import (
    Found,
    Search,
    find_exact,
    find_near_captions,
    find_near_media,
    find_semantic,
)
from data_prep.errors import ConfigError, InputError
from data_prep.report.duplicate_report import render_report
from data_prep.shards.subset import Subset
from data_prep.storage.atomic import write_atomically

SIZES = {"image": ("height", "width"), "audio": ("seconds",)}
logger = logging.getLogger("data_prep.find_duplicates")


def find_duplicates(config: FindDuplicates) -> None:
    """Writes the table of duplicates, a subset of every dataset, and a report.

    Raises:
        InputError: if a dataset, its Parquet files or its embeddings are missing or do not match.
    """
    check_config(config)
    datasets = joined_datasets(config)
    with tempfile.TemporaryDirectory(prefix="isopair-") as folder:
        found, is_remaining = search_all(config, datasets, folder=Path(folder))
    config.output.mkdir(parents=True, exist_ok=True)
    write_table(config.output / "duplicates.parquet", datasets, found)
    write_subsets(config, datasets, is_remaining)
    report = render_report(datasets, found, settings=to_yaml(config), limits=limits_of(config))
    write_atomically(config.output / "report.html", report.encode(errors="backslashreplace"))
    for number, folder in enumerate(config.datasets):
        kept = is_remaining[datasets.starts[number] : datasets.starts[number + 1]]
        say(f"{folder}: {kept.sum():,} of {len(kept):,} samples are kept")
    say(f"{config.output}: duplicates.parquet, .subset files, report.html")


def joined_datasets(config: FindDuplicates) -> JoinedDatasets:
    """Opens the datasets, and checks that the modalities to compare exist.

    Raises:
        InputError: in the cases of `JoinedDatasets`, or if `keep` does not fit the modality.
    """
    datasets = JoinedDatasets(
        config.datasets, against=config.against, modality=config.modality, text=config.text
    )
    if config.keep == "largest" and datasets.media not in SIZES:
        raise InputError(
            f"keep=largest compares pixels or seconds, but {datasets.compared[0]} is of kind "
            f"{datasets.media}; set keep=first"
        )
    return datasets


def limits_of(config: FindDuplicates) -> list[str]:
    """Lists the duplicates that the settings leave in, as sentences for the report."""
    limits = []
    if config.semantic is not None and not config.semantic.across_clusters:
        limits.append(
            "Pairs across the borders of clusters were not searched (semantic.across_clusters: "
            "false): some semantic duplicates, also of evaluation samples, remain."
        )
    if config.near_media is not None and not config.near_media.mirrored:
        limits.append("Mirrored images were not searched (near_media.mirrored: false).")
    return limits


def search_all(
    config: FindDuplicates, datasets: JoinedDatasets, *, folder: Path
) -> tuple[dict[str, GroupedSamples], np.ndarray]:
    """Runs all methods, each on the samples that the previous methods kept.

    Args:
        config: the methods and their options.
        datasets: datasets to search.
        folder: folder for temporary files.

    Returns:
        found: method -> groups.
        is_remaining: bool [samples], whether a sample remains; evaluation samples always do.

    Raises:
        InputError: in the same cases as `find_duplicates`.
    """
    is_remaining = np.ones(len(datasets), dtype=bool)
    rank = rank_of_samples(datasets, keep=config.keep)
    groups: dict[str, GroupedSamples] = {}
    for name, method in methods_of(config).items():
        found = method(Search(datasets, is_remaining, folder, config.memory_gb, config.workers))
        groups[name] = group_samples(
            found.pairs,
            rank=rank if found.rank is None else found.rank,
            num_queries=datasets.num_queries,
        )
        dropped = groups[name].sample[~groups[name].is_kept]
        is_remaining[dropped] = False
        logger.info("%s: %s of the remaining samples are dropped", name, f"{len(dropped):,}")
    return groups, is_remaining


def methods_of(config: FindDuplicates) -> dict[str, Callable[[Search], Found]]:
    """Returns {name: search function} of the configured methods, in execution order."""
    methods: dict[str, Callable[[Search], Found]] = {}
    if config.exact:
        methods["exact"] = find_exact
    if config.near_media is not None:
        methods["near_media"] = partial(find_near_media, options=config.near_media)
    if config.near_captions is not None:
        methods["near_captions"] = partial(find_near_captions, options=config.near_captions)
    if config.semantic is not None:
        methods["semantic"] = partial(find_semantic, options=config.semantic, seed=config.seed)
    return methods


def rank_of_samples(datasets: JoinedDatasets, *, keep: str) -> np.ndarray:
    """Ranks all samples, float64 [samples]; a group keeps the lowest, and of ties the first.

    Args:
        datasets: datasets of the samples.
        keep: "first", or "largest" for the most pixels or seconds.
    """
    if keep == "first":
        return np.zeros(len(datasets))
    sizes = [number_column(datasets, name)[0].astype(float) for name in SIZES[datasets.media]]
    return -np.prod(sizes, axis=0)


def write_subsets(
    config: FindDuplicates, datasets: JoinedDatasets, is_remaining: np.ndarray
) -> None:
    """Writes the subset of every dataset in `datasets`."""
    settings = {key: value for key, value in fixed_values(config).items() if key != "output"}
    preparation = {"command": "find_duplicates", "config": settings}
    for number, folder in enumerate(config.datasets):
        bitmap = is_remaining[datasets.starts[number] : datasets.starts[number + 1]]
        subset = Subset.from_bitmap(datasets.infos[number], bitmap, preparation=preparation)
        subset.write(subset_path(config.output, folder))


def subset_path(output: Path, dataset: Path) -> Path:
    """Returns the path of the subset of a dataset."""
    return output / f"{dataset.resolve().name}.subset"


def check_config(config: FindDuplicates) -> None:
    """Checks the settings and the output folder.

    Raises:
        ConfigError: if the output is not writable, or settings are inconsistent.
    """
    check_output_folder(config.output, key="output")
    paths = [subset_path(config.output, folder) for folder in config.datasets]
    repeated = sorted({path.name for path in paths if paths.count(path) > 1})
    if repeated:
        raise ConfigError(
            f"datasets: two of them would write {repeated[0]}; rename one of the folders, "
            "or run find_duplicates separately for each"
        )
    if not methods_of(config):
        raise ConfigError(
            "expected at least one of exact, near_media, near_captions and semantic, found none"
        )
    if config.semantic is not None:
        for key, folders in (
            ("embeddings", config.datasets),
            ("against_embeddings", config.against),
        ):
            given = getattr(config.semantic, key)
            if len(given) != len(folders):
                raise ConfigError(
                    f"semantic.{key}: expected one folder for each of {len(folders)} datasets, in "
                    f"their order, found {len(given)}; create them with python -m eval.embed"
                )


def dry_run(config: FindDuplicates) -> None:
    """Checks settings and datasets without reading samples, and prints the plan."""
    check_config(config)
    datasets = joined_datasets(config)
    num_against = len(datasets) - datasets.num_queries
    say(
        f"would compare {datasets.num_queries:,} {datasets.media} samples of "
        f"{len(config.datasets)} datasets and {num_against:,} evaluation samples by "
        f"{', '.join(methods_of(config))}, and write to {config.output}"
    )


def main() -> int:
    """Runs the command."""
    return run_command(FindDuplicates, run=find_duplicates, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
