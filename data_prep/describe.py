"""Writes a data sheet of a finished dataset: one HTML file that needs no network.

    python -m data_prep.describe configs/data_prep/describe.yaml dataset=... output=sheet.html

The sheet shows counts, origin, sample media, histograms, languages and licences. It also shows
dropped pairs by reason, duplicates, and every shard with its sha256. DuckDB computes the statistics
from the Parquet files, with memory use independent of the dataset's size. Equal datasets have equal
sheets, byte for byte.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from data_prep.config import Describe

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(Describe, __doc__)

import sys

from data_prep.dedup.duplicate_table import name_in_table
from data_prep.errors import ConfigError
from data_prep.report.data_sheet import SheetContent, render_sheet
from data_prep.report.dataset_statistics import (
    DatasetStatistics,
    count_members,
    count_subsets,
    measure_dataset,
    measure_modality,
    measure_samples,
)
from data_prep.report.described_samples import missing_sidecars, open_described_samples
from data_prep.report.duplicate_statistics import measure_duplicates
from data_prep.report.numbers import bytes_text
from data_prep.report.rejected import read_rejections
from data_prep.report.sheet_gallery import spread_ranks
from data_prep.shards.subset import KeptSamples
from data_prep.storage.atomic import write_atomically


def describe(config: Describe) -> None:
    """Writes the data sheet.

    Raises:
        InputError: if the dataset, its subset or the duplicates are missing or damaged, or do not
            belong together.
    """
    _check_output(config)
    content = measure(config)
    page = render_sheet(content).encode("utf-8", errors="backslashreplace")
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(config.output, page)
    without = (
        " (without statistics: Parquet files are missing)" if content.statistics is None else ""
    )
    say(
        f"{config.output}: data sheet of {len(content.kept):,} samples, "
        f"{bytes_text(len(page))}{without}"
    )


def measure(config: Describe) -> SheetContent:
    """Computes the content of the sheet, except the media of samples.

    Raises:
        InputError: in the same cases as `describe`.
    """
    kept = KeptSamples(config.dataset, subset=config.subset)
    missing = missing_sidecars(kept)
    duplicates = None
    if config.duplicates is not None:
        duplicates = measure_duplicates(
            config.duplicates, kept, memory_gb=config.memory_gb, workers=config.workers
        )
    return SheetContent(
        kept=kept,
        missing_sidecars=missing,
        statistics=None if missing else _measure_samples(kept, config),
        by_modality={} if missing else _measure_modalities(kept, config),
        subsets={} if kept.dataset.modalities.is_pair else count_subsets(kept),
        members=count_members(kept),
        rejections=read_rejections(config.dataset, kept.info),
        duplicates=duplicates,
        shown=spread_ranks(len(kept), num_shown=config.num_samples_shown, seed=config.seed),
    )


def _measure_samples(kept: KeptSamples, config: Describe) -> DatasetStatistics:
    options = {"memory_gb": config.memory_gb, "workers": config.workers}
    with open_described_samples(kept, **options) as connection:
        if kept.dataset.modalities.is_pair:
            return measure_dataset(connection, kept.info.media)
        return measure_samples(connection, kept.dataset.modalities)


def _measure_modalities(kept: KeptSamples, config: Describe) -> dict[str, DatasetStatistics]:
    """Measures each modality of samples of modalities; {} for pairs."""
    modalities = kept.dataset.modalities
    if modalities.is_pair:
        return {}
    options = {"memory_gb": config.memory_gb, "workers": config.workers}
    with open_described_samples(kept, **options) as connection:
        return {name: measure_modality(connection, modalities, name) for name in modalities}


def _check_output(config: Describe) -> None:
    if config.output.is_dir():
        raise ConfigError(f"output={config.output}: expected a file, found a folder")
    check_output_folder(config.output.parent, key="output")


def print_plan(config: Describe) -> None:
    """Prints the numbers of files to read and samples to describe.

    Raises:
        InputError: if the dataset, its subset or the duplicates are missing or damaged.
    """
    _check_output(config)
    kept = KeptSamples(config.dataset, subset=config.subset)
    if config.duplicates is not None:
        path = config.duplicates / "duplicates.parquet"
        name_in_table(path, dataset=config.dataset, info=kept.info)
    missing = missing_sidecars(kept)
    num_files = kept.info.num_shards - len(missing)
    lacking = f" ({len(missing)} are missing, so no statistics would be shown)" if missing else ""
    num_shown = min(config.num_samples_shown, len(kept))
    say(
        f"would read {num_files} Parquet files and {kept.info.num_shards} indexes{lacking}, and "
        f"describe {len(kept):,} samples and show {num_shown} of them in {config.output}"
    )


def main() -> int:
    """Runs the command."""
    return run_command(Describe, run=describe, dry_run=print_plan, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
