"""Sections of a data sheet about what its samples are: captions, media, classes, other columns."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from data_prep.report.dataset_figures import (
    CAPTION_MEASURES,
    MEDIA_MEASURES,
    DatasetFigures,
    MemberCount,
)
from data_prep.report.html import Section, breakable, chips, columns, heading, paragraph, table
from data_prep.report.numbers import bytes_text, share_text, shortened, value_text
from data_prep.report.sheet_charts import count_table, measure_block, spread_text, value_table
from data_prep.report.value_counts import Measure, ValueCounts

MOST_CAPTIONS = 15
MOST_CLASSES = 30
MOST_LICENCES = 30
NUM_EXAMPLES = 3
TYPE_NAMES = {
    "BIGINT": "whole number",
    "BOOLEAN": "true or false",
    "DOUBLE": "number",
    "VARCHAR": "text",
}
LICENCE_NAMES = {"licence", "license", "licences", "licenses"}


def caption_section(figures: DatasetFigures, *, num_samples: int) -> Section:
    """Lengths, languages, and what is said most often."""
    captions, languages = figures.captions, figures.languages
    blocks = [_measures(CAPTION_MEASURES, figures, num_samples=num_samples)]
    texts = []
    if languages.num_distinct:
        texts.append(heading("Languages") + _languages(languages, num_samples=num_samples))
    if figures.scripts:
        scripts = count_table(list(figures.scripts.items()), "script", whole=captions.num_filled)
        texts.append(heading("Captions with letters of a script") + scripts)
    if texts:
        blocks.append(columns(texts))
    blocks += [heading("Most frequent words"), chips(_word_labels(figures.words))]
    blocks += [heading("Captions that stand more than once"), _repeated_captions(captions)]
    return Section(
        "Captions",
        blocks,
        note="Words are told apart by spaces, so that captions in Chinese, Japanese or Thai count "
        "as few words; their length in characters says more.",
    )


def _languages(languages: ValueCounts, *, num_samples: int) -> Markup:
    known = f"Recognised in {languages.num_filled:,} of {num_samples:,} samples; shares of these."
    note = paragraph(known) if languages.num_filled < num_samples else Markup("")
    return note + value_table(languages, "language of the first caption")


def _word_labels(words: ValueCounts) -> list[str]:
    return [f"{shortened(word)} {num:,}" for word, num in words.most_frequent]


def _repeated_captions(captions: ValueCounts) -> Markup:
    repeated = [(text, num) for text, num in captions.most_frequent if num > 1][:MOST_CAPTIONS]
    if not repeated:
        return paragraph("None: all captions are different.")
    num_extra = captions.num_filled - captions.num_distinct
    summary = paragraph(
        f"{captions.num_repeated:,} captions stand more than once; {num_extra:,} of "
        f"{captions.num_filled:,} ({share_text(num_extra, captions.num_filled)}) repeat an earlier "
        "one."
    )
    rows = [(shortened(text), num) for text, num in repeated]
    return summary + count_table(rows, "caption", whole=captions.num_filled)


def media_section(
    figures: DatasetFigures | None,
    members: Mapping[str, MemberCount],
    *,
    media: str,
    num_samples: int,
) -> Section:
    """Sizes and formats."""
    blocks = []
    if figures is not None:
        blocks.append(_measures(MEDIA_MEASURES[media], figures, num_samples=num_samples))
        if figures.num_reencoded is not None:
            share = share_text(figures.num_reencoded, num_samples)
            text = f"{figures.num_reencoded:,} of {num_samples:,} samples ({share})"
            blocks.append(paragraph(f"Re-encoded when the dataset was made: {text}."))
    blocks += [heading("What the shards hold"), _member_table(members, num_samples=num_samples)]
    return Section(
        {"image": "Pictures", "audio": "Sounds"}[media],
        blocks,
        note="Sizes are of the media as they are stored here.",
    )


def _member_table(members: Mapping[str, MemberCount], *, num_samples: int) -> Markup:
    rows = [
        (
            f".{extension}",
            f"{count.num_samples:,}",
            share_text(count.num_samples, num_samples),
            bytes_text(count.num_bytes),
        )
        for extension, count in members.items()
        if count.num_samples
    ]
    header = ("files", "in samples", "share of samples", "in all")
    return table(header, rows, numeric={1, 2, 3})


def _measures(
    measures: tuple[Measure, ...], figures: DatasetFigures, *, num_samples: int
) -> Markup:
    blocks = []
    for measure in measures:
        counts = figures.measures.get(measure)
        if counts is not None:
            whole = num_samples if measure.view == "kept_samples" else counts.num_filled
            blocks.append(measure_block(measure, counts, whole=whole))
    return columns(blocks)


def class_section(figures: DatasetFigures) -> list[Section]:
    """The classes, where samples have one."""
    classes = figures.class_names
    if not classes.num_distinct:
        return []
    summary = (
        f"{classes.num_distinct:,} classes on {classes.num_filled:,} samples; the smallest has "
        f"{classes.least_count:,}, the largest {classes.most_frequent[0][1]:,}."
    )
    return [
        Section(
            "Classes",
            [paragraph(summary), value_table(classes, "class", most_listed=MOST_CLASSES)],
            note="Labels for zero-shot classification, the largest classes first.",
        )
    ]


def licence_section(figures: DatasetFigures, *, num_samples: int) -> list[Section]:
    """The licences, where a column of that name was kept."""
    blocks = []
    for name, (_, counts) in figures.kept.items():
        if name.lower() in LICENCE_NAMES:
            missing = num_samples - counts.num_filled
            rows = [(shortened(str(value)), num) for value, num in counts.most_frequent]
            rows = rows[:MOST_LICENCES]
            others = counts.num_filled - sum(num for _, num in rows)
            rows += [("others", others)] if others else []
            rows += [("not filled in", missing)] if missing else []
            blocks.append(count_table(rows, name, whole=num_samples))
    if not blocks:
        return []
    return [Section("Licences", blocks, note="As the input gave them; nobody has checked them.")]


def column_section(figures: DatasetFigures, *, num_samples: int) -> list[Section]:
    """The columns that the user kept."""
    if not figures.kept:
        return []
    rows = [
        (
            name,
            TYPE_NAMES.get(kind, kind.lower()),
            share_text(counts.num_filled, num_samples),
            _column_text(counts),
        )
        for name, (kind, counts) in figures.kept.items()
    ]
    header = ("column", "type", "filled", "values")
    charts = [
        measure_block(Measure(name, name), counts, whole=counts.num_filled)
        for name, (_, counts) in figures.kept.items()
        if counts.spread and counts.spread.histogram
    ]
    return [
        Section(
            "Other columns",
            [table(header, rows, numeric={2}), *([columns(charts)] if charts else [])],
            note="Kept from the input. They stand in the Parquet files, for filters and subsets.",
        )
    ]


def _column_text(counts: ValueCounts) -> Markup:
    if not counts.num_distinct:
        text = "none"
    elif counts.spread:
        text = spread_text(counts, "")
    else:
        examples = counts.most_frequent[:NUM_EXAMPLES]
        text = f"{counts.num_distinct:,} different: "
        text += "; ".join(f"{value_text(value)} ({num:,})" for value, num in examples)
        text += "; ..." if counts.num_distinct > len(examples) else ""
    return breakable(text)
