"""Sample gallery: thumbnails and short audio excerpts, embedded in the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from data_prep.media.audio_file import audio_seconds
from data_prep.media.decode import MediaError, decode_audio, decode_image
from data_prep.report.html import OWN_PACKAGE, badge, media_frame, render, sound, thumbnail
from data_prep.report.numbers import bytes_text, number_text, shortened
from data_prep.shards.dataset import Dataset
from data_prep.shards.sample import (
    CorruptSampleError,
    Sample,
    captions_of,
    media_extension_of,
    metadata_of,
)
from data_prep.shards.subset import KeptSamples

SOUND_RATE_HZ = 16_000
SOUND_SECONDS = 3.0
MAX_SIDE = 180  # pixels of a thumbnail
MAX_CAPTIONS = 5


def spread_ranks(num_samples: int, *, num_shown: int, seed: int) -> list[int]:
    """Draws one rank from each of `num_shown` equal parts of the dataset."""
    num_shown = min(num_shown, num_samples)
    if not num_shown:
        return []
    limits = [part * num_samples // num_shown for part in range(num_shown + 1)]
    rng = np.random.default_rng(seed)
    return [int(rng.integers(low, high)) for low, high in pairwise(limits)]


class MediaViews:
    """Thumbnails or players of a dataset's samples, each built once."""

    def __init__(self, kept: KeptSamples) -> None:
        self.kept = kept
        self.of = lru_cache(maxsize=None)(self._make)

    def _make(self, ordinal: int) -> tuple[Markup, str]:
        """Returns (thumbnail or player, description of the size); a badge for a damaged sample."""
        try:
            view, size = _views_of_sample(self.kept.dataset, ordinal)
        except (CorruptSampleError, MediaError) as error:
            view, size = badge("damaged", kind="bad"), f"{error}; run data_prep.verify_shards"
        return media_frame(view), size


def _views_of_sample(dataset: Dataset, ordinal: int) -> tuple[Markup, str]:
    """Returns the views of all images and clips of a sample, and their sizes."""
    if dataset.modalities.is_pair:
        return _small_media(dataset.read_sample(ordinal), dataset.info.media)
    contents = dataset.read_modalities(ordinal)
    views, sizes = [], []
    for name, content in contents.media.items():
        kind, extension = dataset.modalities[name].kind, contents.extensions[name]
        view, size = _view(content, extension, kind, key=contents.key)
        views.append(view)
        sizes.append(f"{name}: {size}")
    sizes += [f"{name}: {list(each.shape)} numbers" for name, each in contents.vectors.items()]
    return Markup("").join(views or [badge("no media", kind="plain")]), "; ".join(sizes)


def _small_media(sample: Sample, media: str) -> tuple[Markup, str]:
    extension = media_extension_of(sample.members, media)
    if extension is None:
        raise CorruptSampleError(f"{sample}: expected {media}, found {sorted(sample.members)}")
    return _view(sample.members[extension], extension, media, key=sample.key)


def _view(content: bytes, extension: str, media: str, *, key: str) -> tuple[Markup, str]:
    size = f"{extension}, {bytes_text(len(content))}"
    if media == "image":
        pixels = decode_image(content, extension)
        height, width = pixels.shape[:2]
        view = thumbnail(pixels, max_side=MAX_SIDE, alt=f"image of sample {key}")
        return view, f"{width} x {height}, {size}"
    waveform = decode_audio(content, sample_rate_hz=SOUND_RATE_HZ)
    seconds, rate = audio_seconds(content)
    view = sound(waveform, sample_rate_hz=SOUND_RATE_HZ, max_seconds=SOUND_SECONDS)
    return view, f"{number_text(round(seconds, 2))} s, {rate:,} Hz, {size}"


@dataclass(frozen=True)
class _SampleCard:
    """Values of one card in sample_cards.html."""

    view: Markup
    size: str
    captions: list[str] = field(default_factory=list)
    num_more: int = 0  # captions that are not shown
    facts: str = ""
    error: str | None = None  # set for a damaged sample, and shown instead of its captions


def sample_cards(views: MediaViews, ranks: list[int]) -> Markup:
    """Builds cards of the samples with these ranks among the kept ones."""
    ordinals = views.kept.ordinals_of(ranks).tolist()
    cards = [_sample_card(views, ordinal) for ordinal in ordinals]
    return render(OWN_PACKAGE, "sample_cards.html", cards=cards)


def _sample_card(views: MediaViews, ordinal: int) -> _SampleCard:
    view, size = views.of(ordinal)
    try:
        key, captions, metadata = texts_of_sample(views.kept.dataset, ordinal)
    except CorruptSampleError as error:
        return _SampleCard(view, size, error=str(error))
    facts = [f"key {key}"]
    for name in ("uid", "class_name"):
        if isinstance(metadata.get(name), str):
            facts.append(f"{name.replace('_name', '')} {shortened(metadata[name])}")
    labels = metadata.get("labels")
    facts += [f"{name} {shortened(str(value))}" for name, value in _items_of(labels)]
    return _SampleCard(
        view,
        size,
        captions=[shortened(caption) for caption in captions[:MAX_CAPTIONS]],
        num_more=max(0, len(captions) - MAX_CAPTIONS),
        facts=", ".join(facts),
    )


def _items_of(labels: Any) -> list[tuple[str, Any]]:
    return list(labels.items()) if isinstance(labels, dict) else []


def texts_of_sample(dataset: Dataset, ordinal: int) -> tuple[str, list[str], dict[str, Any]]:
    """Returns (key, texts, content of the .json) of a sample.

    The texts of a sample of modalities start with the names of their modalities.

    Raises:
        CorruptSampleError: if a text cannot be read.
    """
    if dataset.modalities.is_pair:
        sample = dataset.read_sample(ordinal, fields=("txt", "json"))
        return sample.key, captions_of(sample), metadata_of(sample)
    contents = dataset.read_modalities(ordinal, names=dataset.modalities.names_of("text"))
    texts = [f"{name}: {text}" for name, each in contents.texts.items() for text in each]
    return contents.key, texts, {"labels": contents.labels}
