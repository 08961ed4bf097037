"""Reads all pairs of an input, cleans their captions, and writes them to one Parquet.

The captions are cleaned in worker processes, chunk by chunk; the rows keep the input's order.
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
from data_prep.config import CaptionOptions, MakeShards
from data_prep.pipeline.grouping import schema_with, table_of_pairs
from data_prep.shards.columns import (
    KeptType,
    KeptTypes,
    check_kept_names,
)
from data_prep.sources.formats import read_pairs
from data_prep.sources.pair import Pair
from data_prep.workers import run_in_order

PAIRS_PER_CHUNK = 4096
CAPTION_SHOWN = 80  # characters of a dropped caption in its detail


@dataclass(frozen=True)
class PairScan:
    """What a scan found."""

    num_pairs: int
    kept: dict[str, KeptType]


def scan_pairs(config: MakeShards, path: Path) -> PairScan:
    """Writes the pairs with columns of `pair_schema`, and `n`, their place from 0.

    Raises:
        InputError: the input is unusable, or a column to keep is not there.
    """
    import pyarrow.parquet

    check_kept_names(config.keep_columns, media_kind=config.media)
    clean = partial(clean_pairs, options=config.captions, mark_only=config.mark_only)
    num_pairs, kept = 0, KeptTypes(config.keep_columns)
    with pyarrow.parquet.ParquetWriter(path, schema_with("n"), compression="zstd") as writer:
        for pairs in run_in_order(clean, _chunks(read_pairs(config)), workers=config.workers):
            for pair in pairs if config.keep_columns else ():
                kept.add(json.loads(pair.kept or "{}"))
            places = range(num_pairs, num_pairs + len(pairs))
            writer.write_table(table_of_pairs(pairs, n=places))
            num_pairs += len(pairs)
    return PairScan(num_pairs, kept.types(found_in=config.input))


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    while chunk := list(islice(pairs, PAIRS_PER_CHUNK)):
        yield chunk


# ---------------------------------------------------------------------------------- captions


def clean_pairs(
    pairs: list[Pair], *, options: CaptionOptions, mark_only: tuple[str, ...]
) -> list[Pair]:
    """The pairs with clean captions; those that a filter drops carry its name as their reason."""
    cleaner = CaptionCleaner(options)
    return [
        _clean_pair(pair, cleaner, mark_only) if pair.reason is None else _printable(pair)
        for pair in pairs
    ]


def _clean_pair(pair: Pair, cleaner: CaptionCleaner, mark_only: tuple[str, ...]) -> Pair:
    cleaned = cleaner.clean(pair.caption)
    if not cleaned.text:
        return dataclasses.replace(
            pair, reason="empty_caption", detail=f"nothing is left of {_shown(pair.caption)}"
        )
    dropping = next((name for name in cleaned.found if name not in mark_only), None)
    return dataclasses.replace(
        pair,
        caption=cleaned.text,
        language=cleaned.language,
        marks=cleaned.found,
        reason=dropping,
        detail=_shown(cleaned.text) if dropping else "",
    )


def _shown(caption: str) -> str:
    return repr(caption[:CAPTION_SHOWN]) + ("..." if len(caption) > CAPTION_SHOWN else "")


def _printable(pair: Pair) -> Pair:
    """A rejected pair whose texts may be no UTF-8, as it can be listed."""
    listed = {
        name: getattr(pair, name).encode("utf-8", errors="backslashreplace").decode()
        for name in ("media", "detail")
    }
    return dataclasses.replace(pair, **listed, caption="", class_name=None, uid=None, kept=None)
