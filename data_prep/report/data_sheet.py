"""A data sheet: the page that tells someone who has never seen a dataset what it holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from data_prep.report.dataset_figures import DatasetFigures, MemberCount
from data_prep.report.duplicate_figures import DuplicateFigures
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
from data_prep.report.numbers import bytes_text, counted, duration_text, number_text, share_text
from data_prep.report.rejected import Rejection
from data_prep.report.sheet_figures import (
    caption_section,
    class_section,
    column_section,
    licence_section,
    media_section,
)
from data_prep.report.sheet_gallery import MediaViews, sample_cards
from data_prep.report.sheet_losses import drop_section, duplicate_section
from data_prep.shards.subset import KeptSamples

MOST_SHARDS_UNFOLDED = 20
MOST_LANGUAGES = 5
HOW_SHOWN = {
    "image": "Large pictures are shown smaller than they are.",
    "audio": "Long sounds are cut to their first seconds.",
}
# The whole of it is in dataset.json, where it may list a million files.
MOST_PREPARATION_CHARACTERS = 20_000


@dataclass(frozen=True)
class SheetContent:
    """Everything that a sheet shows."""

    kept: KeptSamples
    missing_sidecars: list[Path]
    figures: DatasetFigures | None  # None: sidecars are missing
    members: dict[str, MemberCount]
    rejections: list[Rejection]
    duplicates: DuplicateFigures | None  # None: find_duplicates was not run, or not asked for
    shown: list[int]  # ranks of the samples shown


def render_sheet(content: SheetContent) -> str:
    """The page."""
    kept, figures = content.kept, content.figures
    media, num_samples = kept.info.media, len(kept)
    views = MediaViews(kept)
    sections = [overview_section(content), origin_section(kept)]
    if content.shown:
        sections.append(sample_section(views, content.shown))
    if figures is not None:
        sections.append(caption_section(figures, num_samples=num_samples))
    sections.append(media_section(figures, content.members, media=media, num_samples=num_samples))
    if figures is not None:
        sections += class_section(figures) + licence_section(figures, num_samples=num_samples)
        sections += column_section(figures, num_samples=num_samples)
    sections.append(drop_section(content.rejections, figures, kept))
    sections += duplicate_section(figures, content.duplicates, views)
    sections.append(shard_section(kept))
    return render_page(
        f"Data sheet: {kept.folder.resolve().name}",
        subtitle=f"{num_samples:,} {media} samples, fingerprint {kept.fingerprint}",
        sections=sections,
    )


# ------------------------------------------------------------------------------------- overview


def overview_section(content: SheetContent) -> Section:
    """The counts that one asks for first."""
    kept, info = content.kept, content.kept.info
    facts = {"samples": f"{len(kept):,}"}
    if kept.subset is not None:
        share = share_text(len(kept), info.num_samples)
        facts["samples"] = f"{len(kept):,} kept by the subset: {share} of {info.num_samples:,}"
    if content.figures is not None:
        facts |= _figure_facts(content.figures, len(kept))
    facts["shards"] = f"{info.num_shards:,}, {bytes_text(info.tar_bytes)}"
    facts["dropped on the way"] = _dropped_text(content.rejections)
    blocks = [fact_list(facts)]
    if content.missing_sidecars:
        blocks.append(_missing_note(content))
    noun = {"image": "picture", "audio": "sound"}[info.media]
    return Section(
        "At a glance",
        blocks,
        note=f"A sample is one {noun} with its captions. Samples are stored in tar files, the "
        "shards.",
    )


def _figure_facts(figures: DatasetFigures, num_samples: int) -> dict[str, str]:
    captions, languages = figures.captions, figures.languages
    facts = {"captions": f"{captions.num_filled:,}, {captions.num_distinct:,} of them different"}
    if num_samples:
        facts["captions per sample"] = f"{captions.num_filled / num_samples:.3g} on average"
    if figures.total_seconds is not None:
        facts["duration"] = f"{duration_text(figures.total_seconds)} in all"
    if figures.class_names.num_distinct:
        facts["classes"] = number_text(figures.class_names.num_distinct)
    if languages.num_distinct:
        names = [str(name) for name, _ in languages.most_frequent[:MOST_LANGUAGES]]
        more = languages.num_distinct - len(names)
        facts["languages"] = ", ".join(names) + (f" and {more} more" if more else "")
    if figures.hashes.num_filled:
        num_copies = figures.hashes.num_filled - figures.hashes.num_distinct
        copies = f"{num_copies:,} samples have the media of an earlier one"
        facts["exact copies"] = copies if num_copies else "none"
    return facts


def _dropped_text(rejections: list[Rejection]) -> str:
    num_pairs = sum(each.num for each in rejections if not each.is_clip)
    pairs = counted(num_pairs, "pair")
    num_clips = sum(each.num for each in rejections if each.is_clip)
    clips = f", and {num_clips:,} clips of longer sounds" if num_clips else ""
    return f"{pairs}{clips}" if rejections else "nothing"


def _missing_note(content: SheetContent) -> Markup:
    missing = content.missing_sidecars
    return warning(
        f"{len(missing):,} of {content.kept.info.num_shards:,} shards have no Parquet file "
        f"(first: {missing[0].name}).",
        "So this sheet has no figures about captions, sizes, languages, licences and exact "
        "copies. Make the files with python -m data_prep.index_shards and measure=true, or "
        "restore them.",
    )


# ----------------------------------------------------------------------- origin, samples, shards


def origin_section(kept: KeptSamples) -> Section:
    """What made the dataset, and the subset if there is one."""
    preparation = kept.info.preparation
    config = preparation.get("config", {})
    facts = {
        "made by": str(preparation.get("command", "not recorded")),
        "isopair version": kept.info.isopair_version or "not recorded",
        "from": str(config.get("input", "not recorded")),
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
            folded("How it was chosen", _settings(kept.subset.preparation)),
        ]
    return Section(
        "Where it came from",
        blocks,
        note="Equal fingerprints mean equal data, byte for byte and in the same order.",
    )


def _settings(values: dict) -> Markup:
    text = json.dumps(values, indent=2, ensure_ascii=False)
    if len(text) > MOST_PREPARATION_CHARACTERS:
        text = text[:MOST_PREPARATION_CHARACTERS] + "\n... the rest is in the dataset's own files"
    return preformatted(text)


def sample_section(views: MediaViews, shown: list[int]) -> Section:
    """Some samples to look at or listen to."""
    return Section(
        "Samples",
        [sample_cards(views, shown)],
        note=f"{len(shown)} of {len(views.kept):,}, drawn at random from all parts of the dataset. "
        + HOW_SHOWN[views.kept.info.media],
    )


def shard_section(kept: KeptSamples) -> Section:
    """Every shard with its sha256."""
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
    if len(rows) > MOST_SHARDS_UNFOLDED:
        shards = folded(f"All {len(rows):,} shards", shards)
    whole = paragraph(f"Fingerprint of the whole: {kept.info.fingerprint}")
    return Section(
        "Shards",
        [whole, shards],
        note="python -m data_prep.verify_shards checks them all; sha256sum checks a single one.",
    )
