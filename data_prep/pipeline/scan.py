"""Scan of an input: reads all pairs, cleans their captions, and writes them to one Parquet file.

Worker processes clean captions in chunks; the rows keep the input's order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from data_prep.captions.cleaning import CaptionCleaner
from data_prep.config import CaptionOptions
from data_prep.pipeline.grouping import schema_with, table_of_pairs
from data_prep.shards.columns import (
    KeptType,
    KeptTypes,
    check_kept_names,
)
from data_prep.sources.formats import read_pairs
from data_prep.sources.input_files import PairSource
from data_prep.sources.pair import Pair
from data_prep.workers import run_in_order

PAIRS_PER_CHUNK = 4096
CAPTION_SHOWN = 80  # number of characters of a dropped caption that its detail quotes


@dataclass(frozen=True)
class PairScan:
    """The number of scanned pairs, and the types of the columns to keep."""

    num_pairs: int
    kept: dict[str, KeptType]


def scan_pairs(
    source: PairSource,
    path: Path,
    *,
    captions: CaptionOptions,
    mark_only: tuple[str, ...],
    workers: int,
) -> PairScan:
    """Writes all pairs to a Parquet file, with the columns of `pair_schema` and the row number `n`.

    Args:
        source: input to scan.
        path: Parquet file to write.
        captions: cleaning and filters of captions.
        mark_only: filters that flag a pair instead of rejecting it.
        workers: number of processes that clean captions.

    Raises:
        InputError: if the input is unusable, or a column to keep is missing.
    """
    import pyarrow.parquet

    check_kept_names(source.keep_columns, media_kind=source.media)
    clean = partial(clean_pairs, options=captions, mark_only=mark_only)
    num_pairs, kept = 0, KeptTypes(source.keep_columns)
    with pyarrow.parquet.ParquetWriter(path, schema_with("n"), compression="zstd") as writer:
        for pairs in run_in_order(clean, _chunks(read_pairs(source)), workers=workers):
            for pair in pairs if source.keep_columns else ():
                kept.add(json.loads(pair.kept or "{}"))
            numbers = range(num_pairs, num_pairs + len(pairs))
            writer.write_table(table_of_pairs(pairs, n=numbers))
            num_pairs += len(pairs)
    return PairScan(num_pairs, kept.types(found_in=source.input))


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    while chunk := list(islice(pairs, PAIRS_PER_CHUNK)):
        yield chunk


# ---------------------------------------------------------------------------------- captions


def clean_pairs(
    pairs: list[Pair], *, options: CaptionOptions, mark_only: tuple[str, ...]
) -> list[Pair]:
    """Cleans captions; the reason of a pair dropped by a filter is the filter's name."""
    cleaner = CaptionCleaner(options)
    return [
        _clean_pair(pair, cleaner, mark_only) if pair.reason is None else _printable(pair)
        for pair in pairs
    ]


def _clean_pair(pair: Pair, cleaner: CaptionCleaner, mark_only: tuple[str, ...]) -> Pair:
    cleaned = cleaner.clean(pair.caption)
    if not cleaned.text:
        return dataclasses.replace(
            pair, reason="empty_caption", detail=f"empty after cleaning: {_shown(pair.caption)}"
        )
    dropping = next((name for name in cleaned.found if name not in mark_only), None)
    return dataclasses.replace(
        pair,
        caption=cleaned.text,
        language=cleaned.language,
        marks=(*pair.marks, *cleaned.found),
        reason=dropping,
        detail=_shown(cleaned.text) if dropping else "",
    )


def _shown(caption: str) -> str:
    return repr(caption[:CAPTION_SHOWN]) + ("..." if len(caption) > CAPTION_SHOWN else "")


def _printable(pair: Pair) -> Pair:
    """Returns a rejected pair that can be listed: bytes that are not UTF-8 are escaped."""
    listed = {
        name: getattr(pair, name).encode("utf-8", errors="backslashreplace").decode()
        for name in ("media", "detail")
    }
    return dataclasses.replace(pair, **listed, caption="", class_name=None, uid=None, kept=None)
