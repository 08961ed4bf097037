"""Chooses samples of a dataset by their columns, scores and duplicates, without copying them.

    python -m data_prep.make_subset configs/data_prep/subset.yaml where="width >= 32"

1. the columns of every sample: the shards' Parquets, joined with scores   data_prep.sample_table
2. `where`: a condition on them; a NULL does not fulfil it             data_prep.sample_condition
3. `top`: of what is left, the best part by one column
4. `drop`: of what is left, what find_duplicates found to be repeated

The result is a .subset file, which training and evaluation take beside the dataset. --dry-run does
everything but write it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.config import MakeSubset, TopFraction
from data_prep.config_file import InputError, check_output_folder, fixed_values, run_command
from data_prep.sample_condition import check_condition
from data_prep.sample_table import (
    ORDINAL,
    SampleTable,
    duckdb_errors,
    files_literal,
    name_literal,
    open_duckdb,
    text_literal,
    unknown_column_message,
)
from data_prep.shard_format import DatasetInfo
from data_prep.subset import Subset

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

NUMERIC_TYPES = (
    "TINYINT",
    "SMALLINT",
    "INTEGER",
    "BIGINT",
    "HUGEINT",
    "FLOAT",
    "DOUBLE",
    "DECIMAL",
)
ORDINALS_AT_ONCE = 10_000_000
DUPLICATES_COLUMNS = ("dataset", "ordinal", "key", "kept")


@dataclass(frozen=True)
class Step:
    """What one step of choosing left."""

    name: str
    num_kept: int
    num_without_value: int = 0  # not kept because the column was NULL


@dataclass
class Choice:
    """The samples chosen, and how many each step kept."""

    info: DatasetInfo
    bitmap: np.ndarray  # bool [num_samples]
    steps: list[Step]
    notes: list[str] = field(default_factory=list)


def make_subset(config: MakeSubset) -> None:
    """Writes the subset and prints what each step kept.

    Raises:
        InputError: the dataset, a score, the condition or what is dropped cannot be used, or
            nothing is left.
    """
    check_output_folder(config.output.parent, key="output")
    choice = choose_samples(config)
    print(describe(choice))  # noqa: T201
    kept = {step.name: step.num_kept for step in choice.steps}
    settings = {key: value for key, value in fixed_values(config).items() if key != "output"}
    preparation = {"command": "make_subset", "config": settings, "kept": kept}
    subset = Subset.from_bitmap(choice.info, choice.bitmap, preparation=preparation)
    config.output.parent.mkdir(parents=True, exist_ok=True)
    subset.write(config.output)
    print(f"{config.output}: fingerprint {subset.fingerprint}")  # noqa: T201


def dry_run(config: MakeSubset) -> None:
    """Does everything but write, and prints what each step would keep."""
    check_output_folder(config.output.parent, key="output")
    print(describe(choose_samples(config)))  # noqa: T201


def choose_samples(config: MakeSubset) -> Choice:
    """The samples that a config keeps.

    Raises:
        InputError: as make_subset.
    """
    with open_duckdb(memory_gb=config.memory_gb, workers=config.workers) as connection:
        table = SampleTable(connection, config.dataset)
        for number, pattern in enumerate(config.scores):
            table.join_scores(pattern, number=number)
        if config.embeddings is not None:
            table.join_embeddings(config.embeddings)
        forbid_other_files(connection, [*table.files, *(p.absolute() for p in config.drop)])
        steps = [Step(f"dataset {config.dataset}", table.info.num_samples)]
        write_pool(table, where=config.where, top=config.top)
        if config.where is not None:
            steps.append(keep_where(connection, config.where))
        if config.top is not None:
            steps.append(keep_top(connection, config.top))
        for path in config.drop:
            steps.append(drop_duplicates(connection, path, dataset=config.dataset))
        if steps[-1].num_kept == 0:
            raise InputError(f"no sample is left:\n{format_steps(steps)}")
        return Choice(table.info, read_bitmap(connection, table.info), steps, table.notes)


def forbid_other_files(connection: DuckDBPyConnection, files: list[Path]) -> None:
    """Takes from the database every file but these, the network, and the way back."""
    connection.execute(f"SET allowed_paths = {files_literal(files)}")
    connection.execute("SET enable_external_access = false")
    connection.execute("SET lock_configuration = true")


# --------------------------------------------------------------------------------------- steps


def write_pool(table: SampleTable, *, where: str | None, top: TopFraction | None) -> None:
    """The table `pool`: ordinal, whether `where` holds, and the value for `top`, of each sample.

    All that follows asks this small table; the Parquets are read once.

    Raises:
        InputError: `where` is no condition or cannot be computed, or `top` names no number.
    """
    if where is not None:
        check_condition(table.connection, where, view="samples")
    value = "NULL" if top is None else value_of_top(table, top)
    with duckdb_errors(f"where: {where!r}" if where is not None else str(table.dataset)):
        table.connection.execute(
            f"CREATE TABLE pool AS SELECT {ORDINAL} AS ordinal, "
            f"({where or 'true'}\n) AS is_chosen, {value} AS value FROM samples"
        )
    found = num_kept(table.connection, "true")
    if found != table.info.num_samples:
        raise InputError(
            f"{table.dataset}: keys stand twice in a shard, so that embeddings cannot be joined; "
            "check it with python -m data_prep.verify_shards"
        )


def value_of_top(table: SampleTable, top: TopFraction) -> str:
    """SQL for the column that `top` names; NaN becomes NULL.

    Raises:
        InputError: there is no such column, or it holds no numbers.
    """
    columns = {name.lower(): kind for name, kind in table.columns.items()}
    kind = columns.get(top.column.lower())
    if kind is None:
        raise InputError(f"top.column: {unknown_column_message(top.column, list(columns))}")
    if not kind.removeprefix("U").startswith(NUMERIC_TYPES) or kind.endswith("]"):
        raise InputError(f"top.column={top.column}: expected numbers, found {kind}")
    name = name_literal(top.column)
    is_float = kind in ("FLOAT", "DOUBLE")
    return f"CASE WHEN isnan({name}) THEN NULL ELSE {name} END" if is_float else name


def num_kept(connection: DuckDBPyConnection, condition: str) -> int:
    """Samples of the pool for which a condition holds."""
    return connection.execute(f"SELECT count(*) FROM pool WHERE {condition}").fetchone()[0]


def keep_where(connection: DuckDBPyConnection, where: str) -> Step:
    """Leaves in the pool what fulfils the condition."""
    num_null = num_kept(connection, "is_chosen IS NULL")
    connection.execute("DELETE FROM pool WHERE is_chosen IS NOT TRUE")
    return Step(f"where {where}", num_kept(connection, "true"), num_null)


def keep_top(connection: DuckDBPyConnection, top: TopFraction) -> Step:
    """Leaves in the pool the best part of it; of equal ones, those that come first."""
    num_null = num_kept(connection, "value IS NULL")
    num_best = math.floor(Fraction(str(top.fraction)) * num_kept(connection, "true"))
    with duckdb_errors("top"):
        connection.execute(
            "CREATE TABLE best AS SELECT ordinal FROM pool WHERE value IS NOT NULL "
            f"ORDER BY value DESC, ordinal LIMIT {num_best}"
        )
        connection.execute("DELETE FROM pool WHERE ordinal NOT IN (FROM best)")
    return Step(f"top {top.fraction:g} by {top.column}", num_kept(connection, "true"), num_null)


def drop_duplicates(connection: DuckDBPyConnection, path: Path, *, dataset: Path) -> Step:
    """Takes out of the pool what find_duplicates says is not to be kept of this dataset.

    Raises:
        InputError: the file is missing or no such table, or its rows are not of this dataset.
    """
    source = f"read_parquet({files_literal([path.absolute()])})"
    if not path.exists():
        raise InputError(
            f"drop: {path}: expected a duplicates.parquet; make it with "
            "python -m data_prep.find_duplicates"
        )
    with duckdb_errors(f"drop: {path}"):
        columns = connection.sql(f"FROM {source}").columns
        missing = [name for name in DUPLICATES_COLUMNS if name not in columns]
        if missing:
            raise InputError(
                f"drop: {path}: expected a table of find_duplicates, found no column {missing[0]}"
            )
        names = [
            name
            for (name,) in connection.execute(f"SELECT DISTINCT dataset FROM {source}").fetchall()
        ]
        own = [name for name in names if Path(name).absolute() == dataset.absolute()]
        connection.execute(
            f"CREATE OR REPLACE TABLE dropped AS SELECT ordinal, key FROM {source} "
            f"WHERE NOT kept AND dataset IN ({', '.join(map(text_literal, own)) or 'NULL'})"
        )
        other = connection.execute(
            f"SELECT d.ordinal, d.key, s.key FROM dropped d LEFT JOIN sidecars s "
            f"ON s.{ORDINAL} = d.ordinal WHERE s.key IS DISTINCT FROM d.key "
            "ORDER BY d.ordinal LIMIT 1"
        ).fetchone()
        if other:
            raise InputError(
                f"drop: {path}: sample {other[0]} of {dataset} is {other[1]!r} there, "
                f"{other[2]!r} in the dataset, which has changed; run find_duplicates again"
            )
        connection.execute("DELETE FROM pool WHERE ordinal IN (SELECT ordinal FROM dropped)")
    return Step(f"drop {path}", num_kept(connection, "true"))


def read_bitmap(connection: DuckDBPyConnection, info: DatasetInfo) -> np.ndarray:
    """Bool [num_samples]: what is left in the pool."""
    bitmap = np.zeros(info.num_samples, dtype=bool)
    for start in range(0, info.num_samples, ORDINALS_AT_ONCE):
        end = start + ORDINALS_AT_ONCE
        rows = connection.execute(
            f"SELECT ordinal FROM pool WHERE ordinal >= {start} AND ordinal < {end}"
        ).fetchnumpy()
        bitmap[rows["ordinal"]] = True
    return bitmap


# --------------------------------------------------------------------------------------- table


def describe(choice: Choice) -> str:
    """What was joined, and a table of the steps."""
    return "\n".join([*choice.notes, format_steps(choice.steps)])


def format_steps(steps: list[Step]) -> str:
    """A table of steps: what each kept, and what it did not."""
    rows = [("step", "kept", "not kept", "for want of a value")]
    for before, step in zip([steps[0], *steps], steps, strict=False):
        lost = before.num_kept - step.num_kept
        numbers = (step.num_kept, lost, step.num_without_value)
        rows.append((step.name, *(f"{number:,}" for number in numbers)))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    )


def main() -> int:
    """The command."""
    return run_command(MakeSubset, run=make_subset, dry_run=dry_run, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())
