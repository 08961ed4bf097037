"""Sections of a data sheet about its samples: captions, media, classes, licences, columns."""

from __future__ import annotations

from collections.abc import Mapping

from markupsafe import Markup

from data_prep.report.dataset_statistics import (
    CAPTION_MEASURES,
    MEDIA_MEASURES,
    DatasetStatistics,
    MemberCount,
)
from data_prep.report.html import Section, breakable, chips, columns, heading, paragraph, table
from data_prep.report.numbers import bytes_text, percent_text, shortened, value_text
from data_prep.report.sheet_charts import count_table, measure_block, spread_text, value_table
from data_prep.report.value_counts import Measure, ValueCounts

MAX_CAPTIONS = 15
MAX_CLASSES = 30
MAX_LICENCES = 30
NUM_EXAMPLES = 3
TYPE_NAMES = {
    "BIGINT": "integer",
    "BOOLEAN": "true or false",
    "DOUBLE": "number",
    "VARCHAR": "text",
}
LICENCE_NAMES = {"licence", "license", "licences", "licenses"}


def caption_section(
    statistics: DatasetStatistics, *, num_samples: int, title: str = "Captions"
) -> Section:
    """Builds the section on lengths, languages and frequent words of captions."""
    captions, languages = statistics.captions, statistics.languages
    blocks = [_measures(CAPTION_MEASURES, statistics, num_samples=num_samples)]
    texts = []
    if languages.num_distinct:
        texts.append(heading("Languages") + _languages(languages, num_samples=num_samples))
    if statistics.scripts:
        scripts = count_table(list(statistics.scripts.items()), "script", whole=captions.num_filled)
        texts.append(heading("Captions by script") + scripts)
    if texts:
        blocks.append(columns(texts))
    blocks += [heading("Most frequent words"), chips(_word_labels(statistics.words))]
    blocks += [heading("Duplicate captions"), _repeated_captions(captions)]
    return Section(
        title,
        blocks,
        note="Words are separated by spaces. Captions in Chinese, Japanese or Thai therefore have "
        "few words; use their length in characters instead.",
    )


def _languages(languages: ValueCounts, *, num_samples: int) -> Markup:
    known = f"Detected in {languages.num_filled:,} of {num_samples:,} samples; fractions of these."
    note = paragraph(known) if languages.num_filled < num_samples else Markup("")
    return note + value_table(languages, "language of the first caption")


def _word_labels(words: ValueCounts) -> list[str]:
    return [f"{shortened(word)} {num:,}" for word, num in words.most_frequent]


def _repeated_captions(captions: ValueCounts) -> Markup:
    repeated = [(text, num) for text, num in captions.most_frequent if num > 1][:MAX_CAPTIONS]
    if not repeated:
        return paragraph("None: all captions are different.")
    num_extra = captions.num_filled - captions.num_distinct
    summary = paragraph(
        f"{captions.num_repeated:,} captions occur more than once; {num_extra:,} of "
        f"{captions.num_filled:,} ({percent_text(num_extra, captions.num_filled)}) repeat an "
        "earlier one."
    )
    rows = [(shortened(text), num) for text, num in repeated]
    return summary + count_table(rows, "caption", whole=captions.num_filled)


def media_section(
    statistics: DatasetStatistics | None,
    members: Mapping[str, MemberCount],
    *,
    media: str,
    num_samples: int,
) -> Section:
    """Builds the section on sizes and formats of the media."""
    blocks = []
    if statistics is not None:
        blocks += media_blocks(statistics, media=media, num_samples=num_samples)
    blocks += [heading("Files in the shards"), member_table(members, num_samples=num_samples)]
    return Section(
        {"image": "Pictures", "audio": "Sounds"}[media],
        blocks,
        note="Sizes refer to the stored media.",
    )


def media_blocks(statistics: DatasetStatistics, *, media: str, num_samples: int) -> list[Markup]:
    """Builds the charts of the sizes of images, clips or vectors."""
    blocks = [_measures(MEDIA_MEASURES[media], statistics, num_samples=num_samples)]
    if statistics.num_reencoded is not None:
        percent = percent_text(statistics.num_reencoded, num_samples)
        text = f"{statistics.num_reencoded:,} of {num_samples:,} samples ({percent})"
        blocks.append(paragraph(f"Re-encoded when the dataset was created: {text}."))
    return blocks


def member_table(members: Mapping[str, MemberCount], *, num_samples: int) -> Markup:
    """Builds the table of the members by extension."""
    rows = [
        (
            f".{extension}",
            f"{count.num_samples:,}",
            percent_text(count.num_samples, num_samples),
            bytes_text(count.num_bytes),
        )
        for extension, count in members.items()
        if count.num_samples
    ]
    header = ("files", "in samples", "fraction of samples", "in all")
    return table(header, rows, numeric={1, 2, 3})


def _measures(
    measures: tuple[Measure, ...], statistics: DatasetStatistics, *, num_samples: int
) -> Markup:
    blocks = []
    for measure in measures:
        counts = statistics.measures.get(measure)
        if counts is not None:
            whole = num_samples if measure.view == "kept_samples" else counts.num_filled
            blocks.append(measure_block(measure, counts, whole=whole))
    return columns(blocks)


def class_section(statistics: DatasetStatistics) -> list[Section]:
    """Builds the section on classes, if samples have classes."""
    classes = statistics.class_names
    if not classes.num_distinct:
        return []
    summary = (
        f"{classes.num_distinct:,} classes of {classes.num_filled:,} samples; the smallest has "
        f"{classes.smallest_count:,}, the largest {classes.most_frequent[0][1]:,}."
    )
    return [
        Section(
            "Classes",
            [paragraph(summary), value_table(classes, "class", max_listed=MAX_CLASSES)],
            note="Labels for zero-shot classification, largest classes first.",
        )
    ]


def licence_section(statistics: DatasetStatistics, *, num_samples: int) -> list[Section]:
    """Builds the section on licences if a column with this name was kept."""
    blocks = []
    for name, (_, counts) in statistics.kept.items():
        if name.lower() in LICENCE_NAMES:
            missing = num_samples - counts.num_filled
            rows = [(shortened(str(value)), num) for value, num in counts.most_frequent]
            rows = rows[:MAX_LICENCES]
            others = counts.num_filled - sum(num for _, num in rows)
            rows += [("others", others)] if others else []
            rows += [("missing", missing)] if missing else []
            blocks.append(count_table(rows, name, whole=num_samples))
    if not blocks:
        return []
    return [Section("Licences", blocks, note="As stated in the input; not verified.")]


def column_section(statistics: DatasetStatistics, *, num_samples: int) -> list[Section]:
    """Builds the section on the other columns that the user kept."""
    if not statistics.kept:
        return []
    rows = [
        (
            name,
            TYPE_NAMES.get(kind, kind.lower()),
            percent_text(counts.num_filled, num_samples),
            _column_text(counts),
        )
        for name, (kind, counts) in statistics.kept.items()
    ]
    header = ("column", "type", "filled", "values")
    charts = [
        measure_block(Measure(name, name), counts, whole=counts.num_filled)
        for name, (_, counts) in statistics.kept.items()
        if counts.spread and counts.spread.histogram
    ]
    return [
        Section(
            "Other columns",
            [table(header, rows, numeric={2}), *([columns(charts)] if charts else [])],
            note="Kept from the input in the Parquet files, for filters and subsets.",
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
