"""Sample gallery: thumbnails and short audio excerpts, embedded in the page."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
from markupsafe import Markup

from data_prep.media.audio_file import audio_seconds
from data_prep.media.decode import MediaError, decode_audio, decode_image
from data_prep.report.html import OWN_PACKAGE, badge, media_frame, render, sound, thumbnail
from data_prep.report.numbers import bytes_text, number_text, shortened
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
            sample = self.kept.dataset.read_sample(ordinal)
            view, size = _small_media(sample, self.kept.info.media)
        except (CorruptSampleError, MediaError) as error:
            view, size = badge("damaged", kind="bad"), f"{error}; run data_prep.verify_shards"
        return media_frame(view), size


def _small_media(sample: Sample, media: str) -> tuple[Markup, str]:
    extension = media_extension_of(sample.members, media)
    if extension is None:
        raise CorruptSampleError(f"{sample}: expected {media}, found {sorted(sample.members)}")
    content = sample.members[extension]
    size = f"{extension}, {bytes_text(len(content))}"
    if media == "image":
        pixels = decode_image(content, extension)
        height, width = pixels.shape[:2]
        view = thumbnail(pixels, max_side=MAX_SIDE, alt=f"image of sample {sample.key}")
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
        sample = views.kept.dataset.read_sample(ordinal, fields=("txt", "json"))
        captions, metadata = captions_of(sample), metadata_of(sample)
    except CorruptSampleError as error:
        return _SampleCard(view, size, error=str(error))
    facts = [f"key {sample.key}"]
    for name in ("uid", "class_name"):
        if isinstance(metadata.get(name), str):
            facts.append(f"{name.replace('_name', '')} {shortened(metadata[name])}")
    return _SampleCard(
        view,
        size,
        captions=[shortened(caption) for caption in captions[:MAX_CAPTIONS]],
        num_more=max(0, len(captions) - MAX_CAPTIONS),
        facts=", ".join(facts),
    )
