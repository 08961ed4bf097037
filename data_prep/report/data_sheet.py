"""A data sheet: an HTML page that describes a dataset to someone who has never seen it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from markupsafe import Markup

from data_prep.report.dataset_statistics import DatasetStatistics, MemberCount
from data_prep.report.duplicate_statistics import DuplicateStatistics
from data_prep.report.html import (
    Section,
    code,
    fact_list,
    folded,
    heading,
    paragraph,
    preformatted,
    render_page,
    table,
    warning,
)
from data_prep.report.modality_sections import (
    modality_sections,
    num_having,
    subset_section,
)
from data_prep.report.numbers import bytes_text, counted, duration_text, number_text, percent_text
from data_prep.report.rejected import Rejection
from data_prep.report.sheet_contents import (
    caption_section,
    class_section,
    column_section,
    licence_section,
    media_section,
)
from data_prep.report.sheet_drops import drop_section, duplicate_section
from data_prep.report.sheet_gallery import MediaViews, sample_cards
from data_prep.shards.subset import KeptSamples

MAX_SHARDS_UNFOLDED = 20
MAX_LANGUAGES = 5
SCALING_NOTES = {
    "image": "Large images are scaled down.",
    "audio": "Long clips are truncated to their first seconds.",
}
# Longer settings are truncated (a list of a million files is possible); dataset.json has them all.
MAX_PREPARATION_CHARACTERS = 20_000


@dataclass(frozen=True)
class SheetContent:
    """The content of a data sheet."""

    kept: KeptSamples
    missing_sidecars: list[Path]
    statistics: DatasetStatistics | None  # None: Parquet files are missing
    members: dict[str, MemberCount]
    rejections: list[Rejection]
    duplicates: DuplicateStatistics | None  # None: not configured
    shown: list[int]  # ranks of the samples in the gallery
    # of samples of modalities:
    by_modality: dict[str, DatasetStatistics] = field(default_factory=dict)
    subsets: dict[tuple[str, ...], int] = field(default_factory=dict)  # modalities -> samples


def render_sheet(content: SheetContent) -> str:
    """Renders the data sheet as an HTML page."""
    kept, statistics = content.kept, content.statistics
    if not kept.dataset.modalities.is_pair:
        return _render_samples(content)
    media, num_samples = kept.info.media, len(kept)
    views = MediaViews(kept)
    sections = [overview_section(content), origin_section(kept)]
    if content.shown:
        sections.append(sample_section(views, content.shown))
    if statistics is not None:
        sections.append(caption_section(statistics, num_samples=num_samples))
    sections.append(
        media_section(statistics, content.members, media=media, num_samples=num_samples)
    )
    sections += _last_sections(content, views, captions=statistics)
    return render_page(
        f"Data sheet: {kept.folder.resolve().name}",
        subtitle=f"{num_samples:,} {media} samples, fingerprint {kept.fingerprint}",
        sections=sections,
    )


def _render_samples(content: SheetContent) -> str:
    """Renders the data sheet of a dataset of samples of modalities."""
    kept = content.kept
    num_samples, views = len(kept), MediaViews(kept)
    sections = [overview_section(content), origin_section(kept)]
    if content.shown:
        sections.append(sample_section(views, content.shown))
    sections.append(
        subset_section(
            kept.dataset.modalities, content.subsets, content.members, num_samples=num_samples
        )
    )
    for name, found in content.by_modality.items():
        modality = kept.dataset.modalities[name]
        sections += modality_sections(name, modality, found, views, subsets=content.subsets)
    sections += _last_sections(content, views, captions=None)
    return render_page(
        f"Data sheet: {kept.folder.resolve().name}",
        subtitle=f"{num_samples:,} samples of {', '.join(kept.dataset.modalities)}, fingerprint "
        f"{kept.fingerprint}",
        sections=sections,
    )


# ------------------------------------------------------------------------------------- overview


def overview_section(content: SheetContent) -> Section:
    """Builds the section with the most important counts."""
    kept, info = content.kept, content.kept.info
    facts = {"samples": f"{len(kept):,}"}
    if kept.subset is not None:
        percent = percent_text(len(kept), info.num_samples)
        facts["samples"] = f"{len(kept):,} kept by the subset: {percent} of {info.num_samples:,}"
    modalities = kept.dataset.modalities
    if not modalities.is_pair:
        facts |= {f"with {name}": f"{num:,}" for name, num in num_having(content.subsets).items()}
    elif content.statistics is not None:
        facts |= _statistics_facts(content.statistics, len(kept))
    facts["shards"] = f"{info.num_shards:,}, {bytes_text(info.tar_bytes)}"
    facts["dropped"] = _dropped_text(content.rejections)
    blocks = [fact_list(facts)]
    if content.missing_sidecars:
        blocks.append(_missing_note(content))
    sample = f"has any of {', '.join(modalities)}"
    if modalities.is_pair:
        noun = {"image": "image", "audio": "audio clip"}[info.media]
        sample = f"is one {noun} with its captions"
    return Section(
        "At a glance",
        blocks,
        note=f"A sample {sample}. Samples are stored in tar files, the shards.",
    )


def _statistics_facts(statistics: DatasetStatistics, num_samples: int) -> dict[str, str]:
    captions, languages = statistics.captions, statistics.languages
    facts = {"captions": f"{captions.num_filled:,}, {captions.num_distinct:,} of them different"}
    if num_samples:
        facts["captions per sample"] = f"{captions.num_filled / num_samples:.3g} on average"
    if statistics.total_seconds is not None:
        facts["duration"] = f"{duration_text(statistics.total_seconds)} in all"
    if statistics.class_names.num_distinct:
        facts["classes"] = number_text(statistics.class_names.num_distinct)
    if languages.num_distinct:
        names = [str(name) for name, _ in languages.most_frequent[:MAX_LANGUAGES]]
        more = languages.num_distinct - len(names)
        facts["languages"] = ", ".join(names) + (f" and {more} more" if more else "")
    if statistics.hashes.num_filled:
        num_copies = statistics.hashes.num_filled - statistics.hashes.num_distinct
        copies = f"{num_copies:,} samples have the same media as an earlier sample"
        facts["exact copies"] = copies if num_copies else "none"
    return facts


def _dropped_text(rejections: list[Rejection]) -> str:
    num_pairs = sum(each.num for each in rejections if not each.is_clip)
    pairs = counted(num_pairs, "pair")
    num_clips = sum(each.num for each in rejections if each.is_clip)
    clips = f", and {num_clips:,} clips of longer recordings" if num_clips else ""
    return f"{pairs}{clips}" if rejections else "nothing"


def _missing_note(content: SheetContent) -> Markup:
    missing = content.missing_sidecars
    return warning(
        f"{len(missing):,} of {content.kept.info.num_shards:,} shards have no Parquet file "
        f"(first: {missing[0].name}).",
        "Therefore, this sheet has no statistics of captions, sizes, languages, licences and exact "
        "copies. Restore the files, or create them with python -m data_prep.index_shards and "
        "measure=true.",
    )


# ----------------------------------------------------------------------- origin, samples, shards


def origin_section(kept: KeptSamples) -> Section:
    """Builds the section on the command and settings that created the dataset and the subset."""
    preparation = kept.info.preparation
    config = preparation.get("config", {})
    facts = {
        "created by": str(preparation.get("command", "not recorded")),
        "isopair version": kept.info.isopair_version or "not recorded",
        "input": str(config.get("input", "not recorded")),
        "fingerprint of the dataset": kept.info.fingerprint,
    }
    blocks = [fact_list(facts), folded("All settings", _settings(preparation))]
    if kept.subset is not None:
        blocks += [
            heading("Subset"),
            fact_list(
                {
                    "keeps": f"{len(kept):,} of {kept.info.num_samples:,} samples",
                    "fingerprint of the subset": kept.subset.fingerprint,
                }
            ),
            folded("Settings of the subset", _settings(kept.subset.preparation)),
        ]
    return Section(
        "Origin",
        blocks,
        note="Equal fingerprints mean equal data, byte for byte and in the same order.",
    )


def _settings(values: dict) -> Markup:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    if len(text) > MAX_PREPARATION_CHARACTERS:
        text = text[:MAX_PREPARATION_CHARACTERS] + "\n... continued in the dataset's own files"
    return preformatted(text)


def sample_section(views: MediaViews, shown: list[int]) -> Section:
    """Builds the gallery of samples."""
    modalities = views.kept.dataset.modalities
    kinds = dict.fromkeys(modalities[name].kind for name in modalities.media)
    notes = [f"{len(shown)} of {len(views.kept):,}, drawn at random from all parts of the dataset."]
    return Section(
        "Samples",
        [sample_cards(views, shown)],
        note=" ".join([*notes, *(SCALING_NOTES[kind] for kind in kinds)]),
    )


def shard_section(kept: KeptSamples) -> Section:
    """Builds the list of shards with their sha256."""
    header = ["shard", "samples", "bytes", "sha256 of the tar"]
    rows = [
        [f"{row.name}.tar", f"{row.num_samples:,}", f"{row.tar_bytes:,}", code(row.tar_sha256)]
        for row in kept.dataset.manifest
    ]
    if kept.subset is not None:
        header.insert(2, "kept")
        for row, num_kept in zip(rows, kept.shard_sizes.tolist(), strict=True):
            row.insert(2, f"{num_kept:,}")
    shards = table(header, rows, numeric=range(1, len(header) - 1))
    if len(rows) > MAX_SHARDS_UNFOLDED:
        shards = folded(f"All {len(rows):,} shards", shards)
    whole = paragraph(f"Fingerprint of the dataset: {kept.info.fingerprint}")
    return Section(
        "Shards",
        [whole, shards],
        note="Verify all shards with python -m data_prep.verify_shards, or one with sha256sum.",
    )


def _last_sections(
    content: SheetContent, views: MediaViews, *, captions: DatasetStatistics | None
) -> list[str]:
    """Renders what the sheets of all datasets end with.

    Args:
        content: contents of the sheet.
        views: views of the samples.
        captions: statistics of the captions, for duplicates; None for a dataset of modalities.
    """
    kept, statistics, sections = content.kept, content.statistics, []
    if statistics is not None:
        sections += class_section(statistics) + licence_section(statistics, num_samples=len(kept))
        sections += column_section(statistics, num_samples=len(kept))
    sections.append(drop_section(content.rejections, statistics, kept))
    sections += duplicate_section(captions, content.duplicates, views)
    sections.append(shard_section(kept))
    return sections
