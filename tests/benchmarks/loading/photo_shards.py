"""Datasets of photographs for the benchmarks of loading, kept so that a second run finds them.

Every picture is a part of one of three photographs (of scikit-learn and matplotlib), scaled,
perhaps mirrored, in other colours: on average 31, 72 and 132 kB at 256, 512 and 1024 pixels.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.cbook
import numpy as np
import simplejpeg
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from data_prep.shards.folder import finish_dataset
from data_prep.shards.writer import ShardWriter

# Where the benchmarks keep what is costly to make: datasets, and other loaders' environments.
CACHE = Path(tempfile.gettempdir()) / "isopair-benchmarks"
VERSION = 1  # of the pictures: raise it when they change
SHARD_SAMPLES = 256
WORDS = """a an the of on with near under old small bright wooden red blue green temple roof flower
petals officer uniform portrait garden sky morning light photograph close view detail"""


@dataclass(frozen=True)
class PhotoKind:
    """Pictures of one size."""

    long_side: int  # pixels
    aspect: float  # width over height
    quality: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.long_side, round(self.long_side / self.aspect)


KINDS = {
    256: PhotoKind(256, aspect=1.0, quality=95),
    512: PhotoKind(512, aspect=4 / 3, quality=95),
    1024: PhotoKind(1024, aspect=4 / 3, quality=90),
}


def photo_dataset(
    long_side: int, *, num_samples: int, samples_per_shard: int = SHARD_SAMPLES
) -> Path:
    """Returns the folder of a dataset of such pictures, written if it is missing."""
    folder = CACHE / f"photographs-{VERSION}-{long_side}-{num_samples}-{samples_per_shard}"
    if not (folder / "dataset.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        studio, names = Studio(KINDS[long_side]), []
        for start in range(0, num_samples, samples_per_shard):
            names.append(f"{len(names):08d}")
            numbers = range(start, min(start + samples_per_shard, num_samples))
            write_shard(folder, names[-1], studio, numbers=numbers)
        finish_dataset(folder, names, media="image", preparation={})
    return folder


def write_shard(folder: Path, name: str, studio: Studio, *, numbers: range) -> None:
    writer = ShardWriter(folder, name)
    for number in numbers:
        rng = np.random.default_rng((studio.kind.long_side, number))
        caption = " ".join(rng.choice(WORDS.split(), rng.integers(6, 24)))
        members = {"jpg": studio.picture(rng), "txt": caption.encode()}
        writer.add(f"{number:012d}", members=members)
    writer.finish()


class Studio:
    """Makes JPEGs of one kind out of the photographs."""

    def __init__(self, kind: PhotoKind) -> None:
        self.kind = kind
        portrait = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
        self.photographs = [Image.fromarray(each) for each in load_sample_images().images]
        self.photographs.append(Image.open(portrait).convert("RGB"))

    def picture(self, rng: np.random.Generator) -> bytes:
        """Draws a JPEG that depends on `rng` alone."""
        photograph = self.photographs[rng.integers(len(self.photographs))]
        box = self._part(photograph.size, rng)
        image = photograph.resize(self.kind.size, Image.Resampling.BICUBIC, box=box)
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for change in (ImageEnhance.Color, ImageEnhance.Brightness, ImageEnhance.Contrast):
            image = change(image).enhance(rng.uniform(0.8, 1.2))
        quality = self.kind.quality
        return simplejpeg.encode_jpeg(np.asarray(image), quality=quality, colorsubsampling="420")

    def _part(
        self, size: tuple[int, int], rng: np.random.Generator
    ) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of a part with the aspect of the picture."""
        zoom = rng.uniform(0.5, 1.0)
        width = zoom * min(size[0], size[1] * self.kind.aspect)
        height = width / self.kind.aspect
        left, top = rng.uniform(0, size[0] - width), rng.uniform(0, size[1] - height)
        return left, top, left + width, top + height
