"""Sections of a data sheet about modalities: those that occur together, and each alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from data_prep.modalities.modality import Modalities, Modality
from data_prep.report.dataset_statistics import DatasetStatistics, MemberCount
from data_prep.report.html import Section, fact_list, heading, table
from data_prep.report.numbers import counted, number_text, percent_text
from data_prep.report.sheet_contents import caption_section, media_blocks, member_table
from data_prep.report.sheet_drops import copy_blocks
from data_prep.report.sheet_gallery import MediaViews

TITLES = {"image": "Pictures", "audio": "Sounds", "text": "Texts", "vector": "Vectors"}


def num_having(subsets: Mapping[tuple[str, ...], int]) -> dict[str, int]:
    """Returns the number of samples that have each modality."""
    counts: Counter[str] = Counter()
    for names, num in subsets.items():
        counts.update(dict.fromkeys(names, num))
    return dict(counts)


def subset_section(
    modalities: Modalities,
    subsets: Mapping[tuple[str, ...], int],
    members: Mapping[str, MemberCount],
    *,
    num_samples: int,
) -> Section:
    """Builds the section on the modalities that samples have together.

    Args:
        modalities: modalities of the dataset.
        subsets: number of samples by the modalities that they have.
        members: number of members by extension.
        num_samples: number of samples.
    """
    rows = [
        [
            *("yes" if name in names else "" for name in modalities),
            f"{num:,}",
            percent_text(num, num_samples),
        ]
        for names, num in subsets.items()
    ]
    header = [*modalities, "samples", "fraction"]
    blocks = [table(header, rows, numeric={len(header) - 2, len(header) - 1})]
    blocks += [heading("Files in the shards"), member_table(members, num_samples=num_samples)]
    return Section("Modalities", blocks, note="Samples by the modalities that they have.")


def modality_sections(
    name: str,
    modality: Modality,
    statistics: DatasetStatistics,
    views: MediaViews,
    *,
    subsets: Mapping[tuple[str, ...], int],
) -> list[Section]:
    """Builds the section on one modality; [] if no sample has it.

    Args:
        name: name of the modality.
        modality: kind, shape and statistics.
        statistics: statistics of the samples that have the modality.
        views: media of the dataset.
        subsets: number of samples by the modalities that they have.
    """
    num_samples = num_having(subsets).get(name, 0)
    title = f"{TITLES[modality.kind]}: {name}"
    if not num_samples:
        return []
    if modality.kind == "text":
        return [caption_section(statistics, num_samples=num_samples, title=title)]
    blocks = []
    if modality.kind == "vector":
        blocks.append(fact_list(_vector_facts(modality, is_whole=views.kept.subset is None)))
    blocks += media_blocks(statistics, media=modality.kind, num_samples=num_samples)
    blocks += [heading("Exact copies"), *copy_blocks(statistics)]
    return [Section(title, blocks, note=f"Of {counted(num_samples, 'sample')} that have it.")]


def _vector_facts(modality: Modality, *, is_whole: bool) -> dict[str, str]:
    width = modality.width
    facts = {"shape": f"[time, {width}]" if modality.is_sequence else f"[{width}]"}
    if modality.mean is None or modality.std is None:
        return facts
    scope = "" if is_whole else ", over the whole dataset"
    for key, values in (("means", modality.mean), ("standard deviations", modality.std)):
        low, high = (number_text(float(f"{value:.4g}")) for value in (min(values), max(values)))
        facts[f"{key} of the columns"] = f"{low} to {high}{scope}"
    num_constant = int(np.count_nonzero(np.array(modality.std) == 0))
    facts["constant columns"] = str(num_constant) if num_constant else "none"
    return facts
