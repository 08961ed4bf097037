"""Sections of a data sheet about dropped pairs and about duplicates."""

from __future__ import annotations

from markupsafe import Markup

from data_prep.report.dataset_statistics import DatasetStatistics
from data_prep.report.duplicate_statistics import DuplicateStatistics, Matches
from data_prep.report.html import Section, breakable, folded, heading, line, paragraph, table
from data_prep.report.numbers import number_text, percent_text, shortened
from data_prep.report.rejected import Rejection
from data_prep.report.sheet_charts import count_table
from data_prep.report.sheet_gallery import MediaViews
from data_prep.shards.subset import KeptSamples

MAX_MATCHES_SHOWN = 12


def drop_section(
    rejections: list[Rejection], statistics: DatasetStatistics | None, kept: KeptSamples
) -> Section:
    """Builds the section on dropped pairs, and on samples that were flagged but kept."""
    blocks = [_drop_table(rejections)] if rejections else [paragraph("Nothing was dropped.")]
    if any(each.examples for each in rejections):
        blocks.append(folded("Examples", _example_table(rejections)))
    tags = dict(kept.info.marked) if statistics is None else dict(statistics.tags.most_frequent)
    num_samples = kept.info.num_samples if statistics is None else len(kept)
    if tags:
        tagged = count_table(list(tags.items()), "filter", whole=num_samples)
        blocks += [heading("Flagged by a filter but kept"), tagged]
    note = "A pair is one caption of one image or audio clip in the input."
    if kept.subset is not None:
        note += " The counts cover the whole dataset, not only the subset."
    return Section("Dropped pairs", blocks, note=note)


def _drop_table(rejections: list[Rejection]) -> Markup:
    rows = [
        (
            each.reason,
            each.kind,
            f"{each.num:,}",
            "" if each.fraction is None else percent_text(each.fraction, 1),
        )
        for each in rejections
    ]
    return table(("reason", "kind", "dropped", "of all pairs"), rows, numeric={2, 3})


def _example_table(rejections: list[Rejection]) -> Markup:
    rows = [
        (
            each.reason,
            str(example.get("row", "")),
            breakable(shortened(str(example.get("media", "")))),
            breakable(shortened(str(example.get("detail", "")))),
        )
        for each in rejections
        for example in each.examples
    ]
    note = paragraph(
        "row is the line or row number in the input; rejected.jsonl lists all of them."
    )
    return note + table(("reason", "row", "media", "detail"), rows, numeric={1})


def duplicate_section(
    statistics: DatasetStatistics | None, duplicates: DuplicateStatistics | None, views: MediaViews
) -> list[Section]:
    """Builds the section on exact copies and on the results of find_duplicates."""
    blocks = []
    if statistics is not None and statistics.hashes.num_filled:
        blocks += copy_blocks(statistics)
    if duplicates is not None:
        blocks += _found(duplicates, views)
    if not blocks:
        return []
    note = "Exact copies have the same bytes (sha256)."
    if duplicates is None:
        note += " python -m data_prep.find_duplicates also finds near-duplicates."
    return [Section("Duplicates", blocks, note=note)]


def copy_blocks(statistics: DatasetStatistics) -> list[Markup]:
    """Builds the summary of exact copies."""
    hashes = statistics.hashes
    num_extra = hashes.num_filled - hashes.num_distinct
    if not num_extra:
        return [paragraph("No two samples have the same media bytes.")]
    summary = (
        f"{hashes.num_repeated:,} files occur more than once; {num_extra:,} samples "
        f"({percent_text(num_extra, hashes.num_filled)}) have the same media as an earlier sample."
    )
    rows = [
        (f"{num:,}", ", ".join(keys) + (", ..." if num > len(keys) else ""))
        for num, keys in statistics.duplicate_keys
    ]
    return [paragraph(summary), table(("samples", "keys (largest groups)"), rows)]


def _found(duplicates: DuplicateStatistics, views: MediaViews) -> list[Markup]:
    if not duplicates.num_grouped:
        return [heading("Found by find_duplicates"), paragraph("No duplicates in this dataset.")]
    inside = [matches for matches in duplicates.matches if matches.is_this_dataset]
    outside = [matches for matches in duplicates.matches if not matches.is_this_dataset]
    blocks = [
        heading("Found by find_duplicates"),
        paragraph(
            f"{number_text(duplicates.num_grouped)} samples in "
            f"{number_text(duplicates.num_groups)} groups."
        ),
    ]
    if inside:
        blocks += [heading("Dropped as duplicates of this dataset"), _match_table(inside)]
    if outside:
        title = "Dropped as duplicates of another dataset, such as an evaluation set"
        blocks += [heading(title), _match_table(outside)]
    blocks += [heading("Examples, least similar first"), _match_examples(duplicates, views)]
    return blocks


def _match_table(matches: list[Matches]) -> Markup:
    rows = [
        (each.method, breakable(shortened(each.match_dataset)), number_text(each.num_samples))
        for each in matches
    ]
    return table(("method", "dataset of the match", "samples dropped"), rows, numeric={2})


def _match_examples(duplicates: DuplicateStatistics, views: MediaViews) -> Markup:
    rows = []
    for each in duplicates.matches:
        for example in each.examples:
            dropped = views.of(example.ordinal)[0] + line(example.key)
            match = line(example.match_key)
            if each.is_this_dataset:
                match = views.of(example.match_ordinal)[0] + match
            else:
                match += breakable(shortened(each.match_dataset))
            rows.append((each.method, f"{example.similarity:.3f}", dropped, match))
    header = ("method", "similarity", "dropped", "match")
    return table(header, rows[:MAX_MATCHES_SHOWN], numeric={1})
