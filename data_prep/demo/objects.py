"""Drawn objects with the sounds they make, for retrieval between images and sounds.

An object is near or far. Near objects are large in the picture and loud in the clip, far ones small
and quiet. No caption mentions the distance: only images and sounds show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data_prep.demo.images import (
    IMAGE_PIXELS,
    OVERSAMPLING,
    encode_png,
    paint_on_background,
    reduce_canvas,
)
from data_prep.demo.item import DemoItem
from data_prep.demo.sounds import encode_sound, synthesise


class Distance(NamedTuple):
    """Ranges of what shows the distance of an object."""

    radius: tuple[float, float]  # of the drawing, in pixels
    headroom_db: tuple[float, float]  # of the clip


DISTANCES = {
    "near": Distance((12.0, 14.0), (1.0, 6.0)),
    "far": Distance((6.0, 7.5), (18.0, 24.0)),
}

OBJECT_TEMPLATES = (
    "a drawing of {}",
    "a picture of {}",
    "{}",
    "this is {}",
    "a simple drawing of {}",
    "someone drew {}",
)


class Pen:
    """Draws shapes in a square whose coordinates are from -1 to 1, with y downwards.

    Args:
        centre: centre of the square in the picture, in pixels (right, down).
        radius: half the side of the square, in pixels.
    """

    def __init__(self, centre: Sequence[float], radius: float):
        self._canvas = Image.new("L", (IMAGE_PIXELS * OVERSAMPLING,) * 2)
        self._draw = ImageDraw.Draw(self._canvas)
        self._centre = np.asarray(centre) * OVERSAMPLING
        self._scale = radius * OVERSAMPLING

    def polygon(self, *corners: tuple[float, float], hole: bool = False) -> None:
        self._draw.polygon([self._at(*corner) for corner in corners], fill=self._paint(hole))

    def box(self, left: float, top: float, right: float, bottom: float, hole: bool = False) -> None:
        self._draw.rectangle([self._at(left, top), self._at(right, bottom)], self._paint(hole))

    def disc(self, right: float, down: float, radius: float, hole: bool = False) -> None:
        corners = [self._at(right - radius, down - radius), self._at(right + radius, down + radius)]
        self._draw.ellipse(corners, fill=self._paint(hole))

    def line(self, *points: tuple[float, float], width: float) -> None:
        pixels = max(1, round(width * self._scale))
        self._draw.line([self._at(*each) for each in points], 255, pixels)

    def coverage(self) -> np.ndarray:
        """Returns the painted fraction of each pixel: [H, Wd] in [0, 1]."""
        return reduce_canvas(np.asarray(self._canvas, dtype=np.float64) / 255)

    @staticmethod
    def _paint(hole: bool) -> int:
        return 0 if hole else 255

    def _at(self, right: float, down: float) -> tuple[float, float]:
        return tuple(self._centre + self._scale * np.array([right, down]))


# ------------------------------------------------------------------------------------- drawings


def _cloud(pen: Pen, rng: np.random.Generator) -> None:
    for right, down, radius in ((-0.5, -0.3, 0.42), (0.1, -0.45, 0.5), (0.55, -0.25, 0.4)):
        pen.disc(right, down, radius)
    slope = rng.uniform(-0.25, 0.25)
    for right in (-0.6, -0.2, 0.2, 0.6):
        start = 0.25 + rng.uniform(0, 0.15)
        pen.line((right, start), (right + slope, start + 0.55), width=0.13)


def _windmill(pen: Pen, rng: np.random.Generator) -> None:
    pen.polygon((-0.15, -0.3), (0.15, -0.3), (0.35, 1), (-0.35, 1))
    turned = rng.uniform(0, np.pi / 2)
    for angle in turned + np.arange(4) * np.pi / 2:
        pen.line((0, -0.3), (0.7 * np.cos(angle), 0.7 * np.sin(angle) - 0.3), width=0.2)


def _ambulance(pen: Pen, rng: np.random.Generator) -> None:
    pen.polygon((-0.95, -0.5), (0.45, -0.5), (0.95, 0.05), (0.95, 0.55), (-0.95, 0.55))
    pen.box(-0.2, -0.85, 0.2, -0.5)
    pen.box(-0.65, -0.12, 0.05, 0.12, hole=True)
    pen.box(-0.42, -0.35, -0.18, 0.35, hole=True)
    for right in (-0.5, 0.5):
        pen.disc(right, 0.6, 0.26)


def _whistle(pen: Pen, rng: np.random.Generator) -> None:
    pen.disc(-0.35, 0.2, 0.58)
    pen.box(-0.35, -0.38, 0.95, 0.0)
    pen.disc(-0.35, 0.2, 0.22, hole=True)
    pen.box(0.15, -0.38, 0.35, -0.2, hole=True)


def _bird(pen: Pen, rng: np.random.Generator) -> None:
    pen.disc(-0.05, 0.15, 0.48)
    pen.disc(0.4, -0.4, 0.32)
    pen.polygon((0.65, -0.55), (1, -0.38), (0.65, -0.25))
    pen.polygon((-0.35, 0), (-1, -0.35), (-0.9, 0.25), (-0.35, 0.4))
    pen.disc(0.45, -0.45, 0.09, hole=True)
    for right in (-0.15, 0.15):
        pen.line((right, 0.5), (right, 0.95), width=0.1)


def _clock_face(pen: Pen, rng: np.random.Generator, *, down: float, radius: float) -> None:
    pen.disc(0, down, radius)
    pen.disc(0, down, radius - 0.18, hole=True)
    for length in (0.75, 0.5):
        angle = rng.uniform(0, 2 * np.pi)
        reach = length * (radius - 0.18)
        pen.line((0, down), (reach * np.cos(angle), down + reach * np.sin(angle)), width=0.13)


def _clock(pen: Pen, rng: np.random.Generator) -> None:
    _clock_face(pen, rng, down=0, radius=0.95)


def _alarm_clock(pen: Pen, rng: np.random.Generator) -> None:
    for side in (-1, 1):
        pen.disc(side * 0.5, -0.65, 0.33)
        pen.line((side * 0.4, 0.6), (side * 0.65, 0.98), width=0.16)
    _clock_face(pen, rng, down=0.1, radius=0.7)


def _door(pen: Pen, rng: np.random.Generator) -> None:
    pen.box(-0.5, -0.98, 0.5, 0.98)
    for down in (-0.75, 0.15):
        pen.box(-0.3, down, 0.3, down + 0.6, hole=True)
        pen.box(-0.2, down + 0.1, 0.2, down + 0.5)


def _bell(pen: Pen, rng: np.random.Generator) -> None:
    pen.disc(0, -0.8, 0.16)
    pen.disc(0, -0.25, 0.48)
    pen.polygon((-0.48, -0.25), (0.48, -0.25), (0.85, 0.6), (-0.85, 0.6))
    pen.disc(rng.uniform(-0.2, 0.2), 0.72, 0.2)


def _guitar(pen: Pen, rng: np.random.Generator) -> None:
    pen.disc(0, 0.5, 0.48)
    pen.disc(0, -0.02, 0.34)
    pen.line((0, 0), (0, -0.95), width=0.16)
    pen.box(-0.18, -1, 0.18, -0.72)
    pen.disc(0, 0.3, 0.15, hole=True)


def _car(pen: Pen, rng: np.random.Generator) -> None:
    pen.box(-0.98, -0.05, 0.98, 0.45)
    pen.polygon((-0.65, -0.05), (-0.35, -0.55), (0.35, -0.55), (0.7, -0.05))
    pen.polygon((-0.4, -0.08), (-0.25, -0.4), (-0.05, -0.4), (-0.05, -0.08), hole=True)
    pen.polygon((0.08, -0.08), (0.08, -0.4), (0.28, -0.4), (0.45, -0.08), hole=True)
    for right in (-0.55, 0.55):
        pen.disc(right, 0.5, 0.28)


def _dog(pen: Pen, rng: np.random.Generator) -> None:
    pen.box(-0.6, -0.1, 0.45, 0.4)
    pen.box(0.35, -0.6, 0.75, 0.1)
    pen.box(0.7, -0.35, 1, -0.05)
    pen.polygon((0.35, -0.6), (0.5, -0.98), (0.6, -0.6))
    for right in (-0.6, -0.3, 0.05, 0.3):
        pen.box(right, 0.4, right + 0.17, 0.95)
    pen.line((-0.55, 0), (-0.95, -0.5), width=0.14)


# Kind of sound -> (drawing of the object that makes it, phrases in captions of the picture).
OBJECTS: dict[str, tuple[Callable[[Pen, np.random.Generator], None], tuple[str, ...]]] = {
    "rain": (_cloud, ("rain", "a rain cloud", "rain falling from a cloud")),
    "wind": (_windmill, ("a windmill", "a windmill in the wind", "the wind turning a windmill")),
    "a siren": (_ambulance, ("an ambulance", "an ambulance with a siren", "a car with a siren")),
    "a whistle": (_whistle, ("a whistle", "a whistle to blow")),
    "a bird": (_bird, ("a bird", "a bird with a beak", "a singing bird")),
    "a ticking clock": (_clock, ("a clock", "a clock on the wall", "a round clock")),
    "knocking": (_door, ("a door", "a wooden door", "a closed door")),
    "a bell": (_bell, ("a bell", "a church bell", "a hanging bell")),
    "a plucked string": (_guitar, ("a guitar", "a guitar with strings")),
    "an engine": (_car, ("a car", "a car with its engine running", "a motor car")),
    "an alarm": (_alarm_clock, ("an alarm clock", "an alarm clock with two bells")),
    "a dog": (_dog, ("a dog", "a standing dog", "a dog with pointed ears")),
}


# ------------------------------------------------------------------------------------- samples


def object_items(*, copies: int, seed: Sequence[int]) -> Iterator[DemoItem]:
    """Yields `copies` new samples of every kind and distance, in shuffled order."""
    every = [pair for pair in itertools.product(OBJECTS, DISTANCES) for _ in range(copies)]
    order = np.random.default_rng(seed).permutation(len(every))
    for number, index in enumerate(order):
        (kind, distance), rng = every[index], np.random.default_rng([*seed, number])
        files = {
            f"{number:05d}.png": encode_png(draw_object(kind, distance, rng)),
            f"{number:05d}.flac": encode_sound(sound_of_object(kind, distance, rng), "flac"),
        }
        yield DemoItem(files, (object_caption(kind, rng),), (f"{kind}, {distance}",))


def object_caption(kind: str, rng: np.random.Generator) -> str:
    """Returns a random caption of the picture of an object."""
    phrases = OBJECTS[kind][1]
    template = OBJECT_TEMPLATES[rng.integers(len(OBJECT_TEMPLATES))]
    return template.format(phrases[rng.integers(len(phrases))])


def draw_object(kind: str, distance: str, rng: np.random.Generator) -> np.ndarray:
    """Draws an object of any colour, anywhere in the picture: uint8 [H, Wd, 3]."""
    radius = rng.uniform(*DISTANCES[distance].radius)
    pen = Pen(rng.uniform(radius + 1, IMAGE_PIXELS - radius - 1, 2), radius)
    OBJECTS[kind][0](pen, rng)
    return paint_on_background(pen.coverage(), hue=rng.random(), rng=rng)


def sound_of_object(kind: str, distance: str, rng: np.random.Generator) -> np.ndarray:
    """Synthesizes the sound of an object, as loud as it is near: float64 [samples]."""
    return synthesise(kind, rng, headroom_db=DISTANCES[distance].headroom_db)
