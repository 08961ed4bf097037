"""Reader of one stream: samples of a step -> rows of its buffers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from data_prep.errors import InputError
from pretrain.cache.shard_cache import ShardCache
from pretrain.data.batch import BadSample, StreamBuffers, StreamLayout
from pretrain.data.datasets import open_samples
from pretrain.data.sample_reader import DrawnSample, DrawnView, SampleReader
from pretrain.data.transforms import MediaTransform
from pretrain.data.view_formats import TextFormat, ViewFormat, build_formats
from pretrain.model.tokenizer import Tokenizer
from pretrain.sampling.keyed_random import scramble
from pretrain.sampling.order import StepSamples, source_key
from pretrain.sampling.schedule import distinct_sources
from pretrain.settings.data import Loading, Source, Stream, StreamName
from pretrain.settings.model import Model

# Samples are read, decoded and resized in small groups: one kind of work at a time keeps the
# processor's caches warm, a tenth faster than taking each sample from its bytes to its row.
GROUP_SAMPLES = 16
GROUP_BYTES = 4 << 20
T = TypeVar("T", bound=tuple)


@dataclass
class FilledRows:
    """Result of filling some rows, except for texts."""

    texts: dict[str, list[str | None]] = field(default_factory=dict)  # of each view, one per row
    bad_samples: list[BadSample] = field(default_factory=list)
    # (source, epoch) -> rows that show this epoch, substitutes included
    num_read: Counter[tuple[str, int]] = field(default_factory=Counter)


class StreamReader:
    """Reader of all sources of one stream.

    Args:
        name: the stream's name.
        sources: readers of its sources, as samples of a step number them.
        formats: format of each view.
        objectives: name -> views that it reads.
        teacher_formats: name of a view of a teacher -> (view whose content it shows, its format).

    Raises:
        InputError: if a source has the views of no objective, or no source has those of one.
    """

    def __init__(
        self,
        name: StreamName,
        *,
        sources: Sequence[SampleReader],
        formats: Mapping[str, ViewFormat],
        objectives: Mapping[str, Sequence[str]],
        teacher_formats: Mapping[str, tuple[str, ViewFormat]] | None = None,
    ) -> None:
        self.name = name
        self.teacher_formats = dict(teacher_formats or {})
        self.sources = list(sources)
        keys = [source_key(name, each.source) for each in sources]
        self._source_keys = np.array(keys, dtype=np.uint64)
        self.objectives = dict(objectives)
        self._set_formats(formats)
        self._refuse_useless()

    def with_formats(self, formats: Mapping[str, ViewFormat]) -> StreamReader:
        """Returns a reader of the same samples that shows the same views in other formats."""
        other = copy(self)
        other.sources = [each.with_formats(formats) for each in self.sources]
        other._set_formats(formats)
        return other

    def _set_formats(self, formats: Mapping[str, ViewFormat]) -> None:
        self.formats = dict(formats)
        self.texts = {view: each for view, each in formats.items() if isinstance(each, TextFormat)}
        of_teachers = {name: form for name, (_, form) in self.teacher_formats.items()}
        self.layout = StreamLayout(
            {
                view: replace(
                    each.layout,
                    may_lack=any(source.may_lack(each.view.member) for source in self.sources),
                )
                for view, each in (self.formats | of_teachers).items()
            }
        )

    def _refuse_useless(self) -> None:
        """Refuses sources that no objective can use, and objectives that no source serves."""
        objectives = self.objectives
        read = ", ".join(f"{name} reads {' and '.join(v)}" for name, v in objectives.items())
        for source in self.sources:
            if not any(set(views) <= set(source.formats) for views in objectives.values()):
                raise InputError(
                    f"source {source.source!r}: expected the views of an objective of streams."
                    f"{self.name} ({read}), found {', '.join(source.dataset.modalities)} in "
                    f"{source.dataset.folder}"
                )
        for objective, views in objectives.items():
            if not any(set(views) <= set(source.formats) for source in self.sources):
                found = ", ".join(
                    f"{each.source} has {', '.join(each.dataset.modalities)}"
                    for each in self.sources
                )
                raise InputError(
                    f"streams.{self.name}.objectives.{objective} reads {' and '.join(views)}: "
                    f"expected a source with both, found none ({found})"
                )

    def unserved(self) -> list[str]:
        """Returns the objectives whose views no sample of any source has."""
        return [
            name
            for name, views in self.objectives.items()
            if not any(source.has_any_with(views) for source in self.sources)
        ]

    @property
    def is_slow(self) -> bool:
        """Whether its tokenizer blocks other threads."""
        forms = [*self.texts.values(), *(form for _, form in self.teacher_formats.values())]
        return any(each.tokenizer.is_slow for each in forms if isinstance(each, TextFormat))

    def fill(
        self, buffers: StreamBuffers, samples: StepSamples, rows: range
    ) -> tuple[list[BadSample], Counter[tuple[str, int]]]:
        """Reads the samples of some rows into these rows; returns (substitutions, num_read).

        Several threads may call it at once, each for other rows.
        """
        filled = self.fill_rows(buffers, samples, rows)
        self.fill_texts(buffers, filled, rows)
        return filled.bad_samples, filled.num_read

    def fill_rows(self, buffers: StreamBuffers, samples: StepSamples, rows: range) -> FilledRows:
        """Fills some rows, except for what `fill_texts` fills."""
        filled = FilledRows({view: [] for view in self.texts})
        ordinals = []
        for row, (reader, epoch, sample) in zip(rows, self._decoded(samples, rows), strict=True):
            for name, (view, each) in self.teacher_formats.items():
                drawn = sample.views.get(view)
                again = None if drawn is None else replace(drawn, rng=copy(drawn.rng))
                self._fill(buffers, name, each, again, row)
            for view, each in self.formats.items():
                self._fill(buffers, view, each, sample.views.get(view), row)
            for view, texts in filled.texts.items():
                drawn = sample.views.get(view)
                texts.append(None if drawn is None else drawn.part)
            ordinals.append(sample.ordinal)
            filled.num_read[reader.source, epoch] += 1
            if sample.bad_sample is not None:
                filled.bad_samples.append(sample.bad_sample)
        part = slice(rows.start, rows.stop)
        keys = scramble(
            self._source_keys[samples.sources[part]] ^ np.array(ordinals, dtype=np.uint64)
        )
        for view, batch in buffers.views.items():
            if view not in self.texts:
                batch.keys[part] = torch.from_numpy(keys.view(np.int64))
        return filled

    @staticmethod
    def _fill(
        buffers: StreamBuffers, view: str, form: ViewFormat, drawn: DrawnView | None, row: int
    ) -> None:
        batch = buffers.views[view]
        if batch.present is not None:
            batch.present[row] = drawn is not None
        if drawn is not None:
            form.write(drawn.part, drawn.rng, batch, row)
        elif not isinstance(form, TextFormat):
            for each in batch.inputs:
                each[row] = 0  # not encoded; memory is reused, and its content must not matter

    def fill_texts(self, buffers: StreamBuffers, filled: FilledRows, rows: range) -> None:
        """Fills the tokens of some rows, their lengths and their keys."""
        for view, each in self.texts.items():
            each.write_texts(filled.texts[view], buffers.views[view], rows)
        for name, (view, each) in self.teacher_formats.items():
            if isinstance(each, TextFormat):
                each.write_texts(filled.texts[view], buffers.views[name], rows)

    def _decoded(
        self, samples: StepSamples, rows: range
    ) -> Iterator[tuple[SampleReader, int, DrawnSample]]:
        """(reader, epoch, sample) of each row; read and decoded in groups."""
        part = slice(rows.start, rows.stop)
        wanted = zip(
            [self.sources[number] for number in samples.sources[part].tolist()],
            samples.epochs[part].tolist(),
            samples.ordinals[part].tolist(),
            strict=True,
        )
        opened = (
            (reader, epoch, ordinal, reader.open_training(ordinal, epoch=epoch))
            for reader, epoch, ordinal in wanted
        )
        for group in _groups(opened):
            decoded = (
                (reader, epoch, reader.decode_training(ordinal, epoch=epoch, opened=sample))
                for reader, epoch, ordinal, sample in group
            )
            for each in _groups(decoded):
                yield from each


def _groups(items: Iterable[T]) -> Iterator[list[T]]:
    """Runs of tuples that end with a sample or None, within GROUP_SAMPLES and GROUP_BYTES."""
    group, size = [], 0
    for item in items:
        group.append(item)
        size += item[-1].num_bytes if item[-1] is not None else 0
        if len(group) >= GROUP_SAMPLES or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    yield group


# ------------------------------------------------------------------------------------- building


def open_readers(
    streams: Mapping[StreamName, Stream],
    loading: Loading,
    *,
    model: Model,
    transforms: Mapping[str, MediaTransform],
    tokenizer: Tokenizer | None,
    seed: int,
    cache: ShardCache | None,
    teacher_formats: Mapping[StreamName, Mapping[str, tuple[str, ViewFormat]]] | None = None,
) -> dict[StreamName, StreamReader]:
    """Opens the datasets of all streams.

    Args:
        streams: sections of the config, by name.
        loading: section `loading`.
        model: section `model`.
        transforms: transform of each kind of media.
        tokenizer: tokenizer of texts; None without a text tower.
        seed: the run's seed.
        cache: this machine's cache, for datasets behind URLs.
        teacher_formats: further formats of each stream, see `StreamReader`.

    Raises:
        InputError: if a dataset cannot be used.
        RunError: if a dataset behind a URL cannot be reached now.
    """
    readers = {}
    for name, stream in streams.items():
        formats = build_formats(stream.views, model, transforms=transforms, tokenizer=tokenizer)
        required = [each.view.member for each in formats.values()] if stream.requires_all else []
        sources = [
            _open_source(
                source, loading, formats=formats, required=required, seed=seed, cache=cache
            )
            for source in distinct_sources(stream)
        ]
        objectives = {each: section.views(each) for each, section in stream.objectives.items()}
        readers[name] = StreamReader(
            name,
            sources=sources,
            formats=formats,
            objectives=objectives,
            teacher_formats=(teacher_formats or {}).get(name),
        )
    return readers


def with_transforms(
    readers: Mapping[StreamName, StreamReader],
    streams: Mapping[StreamName, Stream],
    *,
    model: Model,
    transforms: Mapping[str, MediaTransform],
    tokenizer: Tokenizer | None,
) -> dict[StreamName, StreamReader]:
    """Returns readers of the same samples with other transforms.

    Args:
        readers: readers of all streams.
        streams: sections of the config, by name.
        model: section `model`.
        transforms: transform of each kind of media.
        tokenizer: tokenizer of texts; None without a text tower.
    """
    return {
        name: readers[name].with_formats(
            build_formats(stream.views, model, transforms=transforms, tokenizer=tokenizer)
        )
        for name, stream in streams.items()
    }


def _open_source(
    source: Source,
    loading: Loading,
    *,
    formats: Mapping[str, ViewFormat],
    required: Sequence[str],
    seed: int,
    cache: ShardCache | None,
) -> SampleReader:
    takes_bad_shards = loading.on_bad_shard == "substitute"
    samples = open_samples(
        source.dataset,
        subset=source.subset,
        required=required,
        cache=cache,
        takes_bad_shards=takes_bad_shards,
    )
    return SampleReader(
        source.name,
        samples=samples,
        formats=formats,
        seed=seed,
        retries=loading.retries,
        takes_bad_shards=takes_bad_shards,
    )
