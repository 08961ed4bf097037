"""Selection of samples from a SampleTable in steps, with counts of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from data_prep.config import TopFraction
from data_prep.dedup.duplicate_table import name_in_table
from data_prep.errors import InputError
from data_prep.selection.condition import checked_condition
from data_prep.selection.missing_values import FLOAT_TYPES
from data_prep.selection.sample_table import (
    ORDINAL,
    SampleTable,
    duckdb_errors,
    files_literal,
    name_literal,
    text_literal,
    unknown_column_message,
)

INTEGER_TYPES = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
ORDINALS_AT_ONCE = 10_000_000


@dataclass(frozen=True)
class Step:
    """The result of one step of the selection."""

    name: str
    num_kept: int
    num_without_value: int = 0  # removed because the column was NULL


class SamplePool:
    """The remaining samples, held in a small table so that the Parquet files are read only once.

    Args:
        table: table of all samples.
        where: condition for `keep_where`; None: no condition.
        top: fraction and column for `keep_top`; None: no such step.

    Raises:
        InputError: if `where` is not a valid condition, or the column of `top` is not numeric.
    """

    def __init__(self, table: SampleTable, *, where: str | None, top: TopFraction | None) -> None:
        self.table = table
        self.where = where
        self.top = top
        self.connection = table.connection
        condition = "true"
        if where is not None:
            condition = checked_condition(self.connection, where, view="samples")
        value = "NULL" if top is None else value_of_top(table, top)
        with duckdb_errors(str(table.dataset) if where is None else f"where: {where!r}"):
            self.connection.execute(
                f"CREATE TABLE pool AS SELECT {ORDINAL} AS ordinal, "
                f"({condition}\n) AS is_chosen, {value} AS value FROM samples"
            )
        if self._count("true") != table.info.num_samples:
            raise InputError(
                f"{table.dataset}: duplicate keys in a shard, so that embeddings cannot be "
                "joined; check the dataset with python -m data_prep.verify_shards"
            )

    def _count(self, condition: str) -> int:
        query = f"SELECT count(*) FROM pool WHERE {condition}"
        return self.connection.execute(query).fetchone()[0]

    def keep_where(self) -> Step:
        """Keeps the samples that fulfil the condition."""
        num_null = self._count("is_chosen IS NULL")
        self.connection.execute("DELETE FROM pool WHERE is_chosen IS NOT TRUE")
        return Step(f"where {self.where}", self._count("true"), num_null)

    def keep_top(self) -> Step:
        """Keeps the fraction with the highest values; ties are broken by ordinal."""
        num_null = self._count("value IS NULL")
        num_best = math.floor(Fraction(str(self.top.fraction)) * self._count("true"))
        with duckdb_errors("top"):
            self.connection.execute(
                "CREATE TABLE best AS SELECT ordinal FROM pool WHERE value IS NOT NULL "
                f"ORDER BY value DESC, ordinal LIMIT {num_best}"
            )
            self.connection.execute("DELETE FROM pool WHERE ordinal NOT IN (FROM best)")
        name = f"top {self.top.fraction:g} by {self.top.column}"
        return Step(name, self._count("true"), num_null)

    def drop_duplicates(self, path: Path) -> Step:
        """Removes the samples that a table of find_duplicates drops from this dataset.

        Raises:
            InputError: if the file is missing or invalid, or does not cover this dataset.
        """
        name = name_in_table(path, dataset=self.table.dataset, info=self.table.info)
        with duckdb_errors(f"drop: {path}"):
            self.connection.execute(
                "DELETE FROM pool WHERE ordinal IN (SELECT ordinal FROM "
                f"read_parquet({files_literal([path.absolute()])}) "
                f"WHERE NOT kept AND dataset = {text_literal(name)})"
            )
        return Step(f"drop {path}", self._count("true"))

    def bitmap(self) -> np.ndarray:
        """Returns bool [num_samples], by ordinal: whether each sample remains."""
        num_samples = self.table.info.num_samples
        bitmap = np.zeros(num_samples, dtype=bool)
        for start in range(0, num_samples, ORDINALS_AT_ONCE):
            rows = self.connection.execute(
                f"SELECT ordinal FROM pool WHERE ordinal >= {start} "
                f"AND ordinal < {start + ORDINALS_AT_ONCE}"
            ).fetchnumpy()
            bitmap[rows["ordinal"]] = True
        return bitmap


def value_of_top(table: SampleTable, top: TopFraction) -> str:
    """Builds the SQL expression for the column of `top`.

    Raises:
        InputError: if there is no such column, or it is not numeric.
    """
    types = {name.lower(): kind for name, kind in table.columns.items()}
    kind = types.get(top.column.lower())
    if kind is None:
        raise InputError(f"top.column: {unknown_column_message(top.column, list(table.columns))}")
    name = name_literal(top.column)
    is_decimal = kind.startswith("DECIMAL") and not kind.endswith("]")
    if kind in FLOAT_TYPES or is_decimal or kind.removeprefix("U") in INTEGER_TYPES:
        return name
    raise InputError(f"top.column={top.column}: expected numbers, found {kind}")
