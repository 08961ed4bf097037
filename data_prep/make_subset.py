"""Selects samples of a dataset by columns, scores and duplicates, without copying them.

    python -m data_prep.make_subset configs/data_prep/subset.yaml where="width >= 32"

1. data_prep.selection.sample_table joins the columns of the shards with scores.
2. `where` keeps the samples that fulfil a condition; NULL does not (data_prep.selection.pool).
3. `top` keeps the fraction of the remaining samples with the highest values of a column.
4. `drop` removes the duplicates that find_duplicates found.

The result is a .subset file, which training and evaluation use in addition to the dataset.
--dry-run does everything except writing this file.
"""

from __future__ import annotations

from data_prep.command import check_command_line, check_output_folder, run_command, say
from data_prep.config import MakeSubset

if __name__ == "__main__":  # exits on --help or an invalid config, before slow imports
    check_command_line(MakeSubset, __doc__)

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.config_file import fixed_values
from data_prep.errors import InputError
from data_prep.selection.pool import SamplePool, Step
from data_prep.selection.sample_table import SampleTable, files_literal, open_duckdb
from data_prep.shards.manifest import DatasetInfo
from data_prep.shards.subset import Subset

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection


@dataclass(frozen=True)
class Selection:
    """The selected samples, and the counts of each step."""

    info: DatasetInfo
    bitmap: np.ndarray  # bool [num_samples]
    steps: list[Step]
    notes: list[str]  # descriptions of the joined scores and embeddings


def make_subset(config: MakeSubset) -> None:
    """Writes the subset and prints how many samples each step kept.

    Raises:
        InputError: if the dataset, a score, the condition or a table of duplicates is invalid, or
            no sample remains.
    """
    check_output_folder(config.output.parent, key="output")
    selection = choose_samples(config)
    say(describe(selection))
    kept = [[step.name, step.num_kept] for step in selection.steps]
    settings = {key: value for key, value in fixed_values(config).items() if key != "output"}
    preparation = {"command": "make_subset", "config": settings, "kept": kept}
    subset = Subset.from_bitmap(selection.info, selection.bitmap, preparation=preparation)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    subset.write(config.output)
    say(f"{config.output}: fingerprint {subset.fingerprint}")


def dry_run(config: MakeSubset) -> None:
    """Selects samples without writing, and prints how many samples each step would keep."""
    check_output_folder(config.output.parent, key="output")
    say(describe(choose_samples(config)))


def choose_samples(config: MakeSubset) -> Selection:
    """Selects the samples that a config keeps.

    Raises:
        InputError: in the same cases as `make_subset`.
    """
    with (
        tempfile.TemporaryDirectory(prefix="isopair-") as downloads,
        open_duckdb(memory_gb=config.memory_gb, workers=config.workers) as connection,
    ):
        table = SampleTable(connection, config.dataset)
        for number, pattern in enumerate(config.scores):
            table.join_scores(pattern, number=number, downloads=Path(downloads))
        if config.embeddings is not None:
            table.join_embeddings(config.embeddings)
        forbid_other_files(connection, [*table.files, *(p.absolute() for p in config.drop)])
        pool = SamplePool(table, where=config.where, top=config.top)
        steps = [Step(f"dataset {config.dataset}", table.info.num_samples)]
        if config.where is not None:
            steps.append(pool.keep_where())
        if config.top is not None:
            steps.append(pool.keep_top())
        steps += [pool.drop_duplicates(path) for path in config.drop]
        if steps[-1].num_kept == 0:
            raise InputError(f"no sample remains:\n{format_steps(steps)}")
        return Selection(table.info, pool.bitmap(), steps, table.notes)


def forbid_other_files(connection: DuckDBPyConnection, files: list[Path]) -> None:
    """Restricts the database irrevocably to these files, and disables network access."""
    connection.execute(f"SET allowed_paths = {files_literal(files)}")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


def describe(selection: Selection) -> str:
    """Describes the joined files and the steps."""
    return "\n".join([*selection.notes, format_steps(selection.steps)])


def format_steps(steps: list[Step]) -> str:
    """Formats a table of steps with the numbers of kept and removed samples."""
    rows = [("step", "kept", "not kept", "value missing")]
    for before, step in zip([steps[0], *steps], steps, strict=False):
        lost = before.num_kept - step.num_kept
        numbers = (step.num_kept, lost, step.num_without_value)
        rows.append((step.name, *(f"{number:,}" for number in numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main() -> int:
    """Runs the command."""
    return run_command(MakeSubset, run=make_subset, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
