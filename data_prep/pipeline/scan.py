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
from data_prep.modalities.modality import Modalities
from data_prep.pipeline.grouping import schema_with, table_of_pairs
from data_prep.shards.columns import (
    KeptType,
    KeptTypes,
    check_kept_names,
)
from data_prep.sources.formats import read_pairs
from data_prep.sources.input_files import PairSource
from data_prep.sources.pair import Pair, SampleParts
from data_prep.sources.sample_rows import checked_count
from data_prep.workers import run_in_order

PAIRS_PER_CHUNK = 4096
CAPTION_SHOWN = 80  # number of characters of a dropped caption that its detail quotes


@dataclass(frozen=True)
class PairScan:
    """The number of scanned pairs, and the types of the columns to keep and of the labels."""

    num_pairs: int
    kept: dict[str, KeptType]
    labels: dict[str, KeptType]  # of samples of modalities


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

    modalities = source.columns.modalities() or Modalities.pair(source.media)
    labels = KeptTypes(source.columns.labels)
    check_kept_names([*source.keep_columns, *labels.known], modalities=modalities)
    clean = partial(clean_pairs, options=captions, mark_only=mark_only, least=source.min_modalities)
    num_pairs, kept = 0, KeptTypes(source.keep_columns)
    with pyarrow.parquet.ParquetWriter(path, schema_with("n"), compression="zstd") as writer:
        for pairs in run_in_order(clean, _chunks(read_pairs(source)), workers=workers):
            for pair in pairs if source.keep_columns else ():
                kept.add(json.loads(pair.kept or "{}"))
            for pair in pairs if labels.known else ():
                labels.add(SampleParts.from_json(pair.parts).labels if pair.parts else {})
            numbers = range(num_pairs, num_pairs + len(pairs))
            writer.write_table(table_of_pairs(pairs, n=numbers))
            num_pairs += len(pairs)
    return PairScan(
        num_pairs,
        kept.types(found_in=source.input),
        labels.types(found_in=source.input, key="columns.labels"),
    )


def _chunks(pairs: Iterator[Pair]) -> Iterator[list[Pair]]:
    while chunk := list(islice(pairs, PAIRS_PER_CHUNK)):
        yield chunk


# ---------------------------------------------------------------------------------- captions


def clean_pairs(
    pairs: list[Pair], *, options: CaptionOptions, mark_only: tuple[str, ...], least: int = 0
) -> list[Pair]:
    """Cleans captions; the reason of a pair dropped by a filter is the filter's name.

    Args:
        pairs: pairs, or samples of modalities.
        options: cleaning and filters.
        mark_only: filters that flag a pair instead of rejecting it.
        least: number of modalities that a sample must have.
    """
    cleaner = CaptionCleaner(options)
    cleaned = []
    for pair in pairs:
        if pair.reason is not None:
            cleaned.append(_printable(pair))
        elif pair.parts is None:
            cleaned.append(_clean_pair(pair, cleaner, mark_only))
        else:
            cleaned.append(_clean_sample(pair, cleaner, mark_only, least=least))
    return cleaned


def _clean_sample(
    pair: Pair, cleaner: CaptionCleaner, mark_only: tuple[str, ...], *, least: int
) -> Pair:
    """Cleans all texts of a sample.

    A text that is empty after cleaning is left out. A filter drops single texts of a list, but
    rejects the whole sample with the last text of a modality.
    """
    parts = SampleParts.from_json(pair.parts)
    marks, languages = list(pair.marks), []
    for name, texts in list(parts.texts.items()):
        found = [cleaner.clean(text) for text in texts]
        found = [each for each in found if each.text]
        dropping = [next((f for f in each.found if f not in mark_only), None) for each in found]
        kept = [each for each, filtered in zip(found, dropping, strict=True) if filtered is None]
        if found and not kept:
            detail = _shown(found[0].text)
            return dataclasses.replace(pair, reason=dropping[0], detail=detail, modality=name)
        parts.texts.pop(name)
        if kept:
            parts.texts[name] = [each.text for each in kept]
            marks += [mark for each in kept for mark in each.found]
            languages.append(kept[0].language)
    first = next(iter(parts.texts.values()), [""])[0]
    pair = dataclasses.replace(
        pair,
        caption=first,
        language=next(iter(languages), None),
        marks=tuple(dict.fromkeys(marks)),
        parts=parts.to_json(),
    )
    return checked_count(pair, len(parts), least=least)


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
    return dataclasses.replace(
        pair, **listed, caption="", class_name=None, uid=None, kept=None, parts=None
    )
