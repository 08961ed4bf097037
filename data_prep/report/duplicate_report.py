"""Page report.html of find_duplicates: counts, matches between datasets, and example groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from data_prep.dedup.groups import GroupedSamples
from data_prep.dedup.joined_datasets import JoinedDatasets
from data_prep.errors import InputError
from data_prep.report.html import (
    OWN_PACKAGE,
    Section,
    badge,
    folded,
    paragraph,
    preformatted,
    render,
    render_page,
    table,
)
from data_prep.report.numbers import counted, number_text, percent_text, shortened
from data_prep.report.sheet_gallery import MediaViews, texts_of_sample
from data_prep.shards.sample import (
    CorruptSampleError,
)
from data_prep.shards.subset import KeptSamples

GROUPS_SHOWN = 12  # per method
MEMBERS_SHOWN = 4  # per group


def render_report(
    datasets: JoinedDatasets,
    found: Mapping[str, GroupedSamples],
    *,
    settings: str,
    limits: Sequence[str] = (),
) -> str:
    """Renders the report as an HTML page.

    Args:
        datasets: compared datasets.
        found: method -> groups.
        settings: config of the search as YAML.
        limits: sentences about duplicates that the settings leave in.
    """
    gallery = _Gallery(datasets)
    sections = [
        Section("Dropped", [_counts_table(datasets, found)], note=_COUNTS_NOTE),
        Section("Matches between datasets", [_matches_table(datasets, found)], note=_MATCHES_NOTE),
        *(
            Section(f"Groups: {method}", gallery.blocks(groups), note=_METHOD_NOTES[method])
            for method, groups in found.items()
            if len(groups.sample)
        ),
        *([Section("Limits", [paragraph(each) for each in limits])] if limits else []),
        Section("Settings", [folded("The config", preformatted(settings))]),
    ]
    num_dropped = sum(int((~groups.is_kept).sum()) for groups in found.values())
    subtitle = (
        f"{num_dropped:,} of {datasets.num_queries:,} samples are duplicates or in an "
        "evaluation set"
    )
    return render_page("Duplicates", subtitle=subtitle, sections=sections)


_COUNTS_NOTE = (
    "Each method searches the samples that the previous methods kept: none is counted twice."
)
_MATCHES_NOTE = (
    "Each dropped sample counts once, for the dataset of its best match; evaluation sets take "
    "precedence."
)
_METHOD_NOTES = {
    "exact": "Equal bytes.",
    "near_media": (
        "Similarity is chained: two samples of a group may be less similar than the threshold."
    ),
    "near_captions": "Captions are nearly equal; the media may differ.",
    "semantic": (
        "Each group keeps its sample with the lowest similarity to the cluster's centroid (Abbas "
        "et al. 2023). Similarity is chained."
    ),
}


def _counts_table(datasets: JoinedDatasets, found: Mapping[str, GroupedSamples]) -> Markup:
    rows = []
    for number in range(datasets.num_datasets):
        size = datasets.infos[number].num_samples
        dropped = [_dropped_of(datasets, groups, number) for groups in found.values()]
        left = size - sum(dropped)
        cells = [f"{count:,}" for count in (size, *dropped, left)]
        rows.append([str(datasets.folders[number]), *cells, percent_text(left, size)])
    header = ["dataset", "samples", *found, "kept", "fraction"]
    return table(header, rows, numeric=range(1, len(header)))


def _dropped_of(datasets: JoinedDatasets, groups: GroupedSamples, number: int) -> int:
    dataset, _ = datasets.locate(groups.sample[~groups.is_kept])
    return int((dataset == number).sum())


def _matches_table(datasets: JoinedDatasets, found: Mapping[str, GroupedSamples]) -> Markup:
    rows = []
    for method, groups in found.items():
        dropped = ~groups.is_kept
        own, _ = datasets.locate(groups.sample[dropped])
        other, _ = datasets.locate(groups.match[dropped])
        similarity = groups.similarity[dropped]
        for first, second in sorted(set(zip(own.tolist(), other.tolist(), strict=True))):
            is_here = (own == first) & (other == second)
            is_evaluation = second >= datasets.num_datasets
            name = Markup.escape(f"{datasets.folders[second]} ")
            if is_evaluation:
                name += badge("evaluation", kind="bad")
            counts = [f"{is_here.sum():,}", f"{similarity[is_here].min():.3f}"]
            rows.append([method, str(datasets.folders[first]), name, *counts])
    if not rows:
        return paragraph("Nothing was found.")
    header = ["method", "samples of", "match samples of", "dropped", "lowest similarity"]
    return table(header, rows, numeric=(3, 4))


@dataclass(frozen=True)
class _Member:
    """Values of one sample in duplicate_group.html."""

    view: Markup
    state: Markup
    folder: str
    ordinal: int
    text: str


class _Gallery:
    """Example groups with their media, or with a note if the tars are missing."""

    def __init__(self, datasets: JoinedDatasets) -> None:
        self.datasets = datasets
        self._views: dict[int, MediaViews | str] = {}

    def blocks(self, groups: GroupedSamples) -> list[Markup]:
        """Builds blocks with the number of groups, and with groups from all parts of the list."""
        num_groups = int(groups.group[-1]) + 1
        chosen = np.unique(np.linspace(0, num_groups - 1, GROUPS_SHOWN).astype(np.int64))
        blocks = [paragraph(f"{counted(len(chosen), 'group')} of {num_groups:,}:")]
        for group in chosen.tolist():
            first, last = np.searchsorted(groups.group, [group, group + 1])
            rows = first + np.argsort(~groups.is_kept[first:last], kind="stable")
            members = [self._member(groups, row) for row in rows[:MEMBERS_SHOWN]]
            num_members = f"{last - first:,}"
            blocks.append(
                render(
                    OWN_PACKAGE, "duplicate_group.html", num_members=num_members, members=members
                )
            )
        return blocks

    def _member(self, groups: GroupedSamples, row: int) -> _Member:
        number, ordinal = (int(part) for part in self.datasets.locate(groups.sample[row]))
        if groups.is_kept[row]:
            is_evaluation = number >= self.datasets.num_datasets
            state = badge("evaluation" if is_evaluation else "kept", kind="good")
        else:
            similarity = number_text(float(groups.similarity[row]))
            state = badge(f"dropped, similarity {similarity}", kind="bad")
        view, text = self._sample(number, ordinal)
        folder = str(self.datasets.folders[number])
        return _Member(view, state, folder=folder, ordinal=ordinal, text=text)

    def _sample(self, number: int, ordinal: int) -> tuple[Markup, str]:
        views = self._views_of(number)
        if isinstance(views, str):
            return badge("not available", kind="plain"), views
        view, _ = views.of(ordinal)
        try:
            key, texts, _ = texts_of_sample(views.kept.dataset, ordinal)
            return view, f"{key}: {shortened(' | '.join(texts))}"
        except CorruptSampleError as error:
            return view, str(error)

    def _views_of(self, number: int) -> MediaViews | str:
        if number not in self._views:
            try:
                kept = KeptSamples(self.datasets.folders[number], subset=None)
                self._views[number] = MediaViews(kept)
            except InputError as error:
                self._views[number] = str(error)
        return self._views[number]
