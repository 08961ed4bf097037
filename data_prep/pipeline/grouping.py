"""Grouping of pairs into items; DuckDB sorts pairs on disk, so their number is not limited.

The pairs of one media file form one item, at the position of the first pair. Pairs whose class name
conflicts with their item are rejected, and the number of items that share a caption is limited.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import pyarrow

from data_prep.sources.pair import Item, Pair

MEMORY_LIMIT = "300MB"
ROWS_PER_BATCH = 4096

# Pairs of one media file have the same `item`: the number of the first pair.
ITEM_OF_PAIR = {
    "group": """
        SELECT rows.*, coalesce(firsts.item, rows.n) AS item FROM rows LEFT JOIN
        (SELECT media, place, min(n) AS item FROM rows WHERE media <> '' GROUP BY media, place)
        AS firsts ON rows.media = firsts.media AND rows.place IS NOT DISTINCT FROM firsts.place
    """,
    "row": "SELECT *, n AS item FROM rows",
}
# Number of earlier items with an equal caption, ignoring case.
NUM_EARLIER = """
    SELECT repeated, item, row_number() OVER (PARTITION BY repeated ORDER BY item) - 1 AS earlier
    FROM (SELECT DISTINCT lower(caption) AS repeated, item FROM pairs
          WHERE reason IS NULL AND caption <> '')
"""
PAIRS = "SELECT *, 0 AS earlier FROM pairs ORDER BY item, n"
PAIRS_WITH_REPEATS = f"""
    SELECT pairs.*, coalesce(counts.earlier, 0) AS earlier FROM pairs
    LEFT JOIN ({NUM_EARLIER}) AS counts
    ON lower(pairs.caption) = counts.repeated AND pairs.item = counts.item
    ORDER BY pairs.item, n
"""


@cache
def pair_schema() -> pyarrow.Schema:
    """Returns the Parquet schema of a pair: one column per field."""
    types = {"row": pyarrow.int64(), "marks": pyarrow.list_(pyarrow.string())}
    return pyarrow.schema(
        [
            (field.name, types.get(field.name, pyarrow.string()))
            for field in dataclasses.fields(Pair)
        ]
    )


def group_pairs(
    rows_path: Path,
    *,
    scratch: Path,
    captions_per_item: str,
    max_repeats: int | None,
    drops_repeated: bool,
) -> Iterator[Item]:
    """Yields the items in order of first appearance.

    Args:
        rows_path: Parquet file that `scan_pairs` wrote.
        scratch: folder for data that does not fit in memory.
        captions_per_item: "group" joins the pairs of one media file; "row" keeps pairs separate.
        max_repeats: number of items that may share a caption; None: no limit.
        drops_repeated: whether to reject pairs above the limit; otherwise they are only flagged.
    """
    query = PAIRS if max_repeats is None else PAIRS_WITH_REPEATS
    rows = _sorted_rows(rows_path, scratch, pairs=ITEM_OF_PAIR[captions_per_item], query=query)
    for number, (_, group) in enumerate(groupby(rows, key=itemgetter("item"))):
        pairs = []
        for row in group:
            pair = _pair_of_row(row)
            if max_repeats is not None and pair.reason is None and row["earlier"] >= max_repeats:
                pair = _repeated(pair, row["earlier"], drops=drops_repeated)
            pairs.append(pair)
        pairs = [_check_class_name(pair, pairs) for pair in pairs]
        yield Item(number=number, media=pairs[0].media, place=pairs[0].place, pairs=pairs)


def _sorted_rows(
    rows_path: Path, scratch: Path, *, pairs: str, query: str
) -> Iterator[dict[str, Any]]:
    import duckdb

    settings = {"memory_limit": MEMORY_LIMIT, "threads": 1, "temp_directory": str(scratch)}
    with duckdb.connect(config=settings) as database:
        database.from_parquet(str(rows_path)).create_view("rows")
        database.sql(pairs).create_view("pairs")
        for batch in database.sql(query).to_arrow_reader(ROWS_PER_BATCH):
            yield from batch.to_pylist()


def _repeated(pair: Pair, num_earlier: int, *, drops: bool) -> Pair:
    if not drops:
        return dataclasses.replace(pair, marks=(*pair.marks, "caption_repeated"))
    detail = f"{num_earlier:,} earlier items have this caption"
    return dataclasses.replace(pair, reason="caption_repeated", detail=detail)


def _check_class_name(pair: Pair, pairs: Sequence[Pair]) -> Pair:
    first = next((other for other in pairs if other.reason is None), pair)
    if pair.reason is not None or pair.class_name == first.class_name:
        return pair
    detail = f"row {first.row} has {first.class_name!r}, this row has {pair.class_name!r}"
    return dataclasses.replace(pair, reason="conflicting_class_name", detail=detail)


# --------------------------------------------------------------------------- pairs in a Parquet


def table_of_pairs(pairs: Sequence[Pair], **extra: Sequence[int]) -> pyarrow.Table:
    """Builds a table with one row per pair, and additional integer columns in front."""
    columns = {name: [getattr(pair, name) for pair in pairs] for name in pair_schema().names}
    return pyarrow.Table.from_pydict({**extra, **columns}, schema=schema_with(*extra))


def schema_with(*names: str) -> pyarrow.Schema:
    """Returns the schema of a pair, with additional integer columns in front."""
    return pyarrow.schema([*((name, pyarrow.int64()) for name in names), *pair_schema()])


def items_of_table(table: pyarrow.Table) -> list[Item]:
    """Returns the items of a table of pairs that has a column `item`, in order."""
    items = []
    for number, rows in groupby(table.to_pylist(), key=itemgetter("item")):
        pairs = [_pair_of_row(row) for row in rows]
        items.append(Item(number, pairs[0].media, pairs[0].place, pairs))
    return items


def _pair_of_row(row: dict[str, Any]) -> Pair:
    values = {name: row.get(name) for name in pair_schema().names}
    return Pair(**{**values, "marks": tuple(values["marks"])})
