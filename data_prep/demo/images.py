"""Images of the demo: handwritten digits, and drawn scenes that test composition.

A scene is one shape with a colour, a size, a position and a texture. Some combinations of these
five attributes are held out of training, but training contains every pair of values (such as red
and star). Retrieving a held-out scene therefore requires a new combination of known attributes.
"""

from __future__ import annotations

import colorsys
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from data_prep.demo.item import DemoItem
from data_prep.errors import InputError

IMAGE_PIXELS = 32  # height and width
OVERSAMPLING = 4  # shapes are drawn at this scale and then reduced

# Attribute -> value -> phrases in captions.
SHAPES = {
    "circle": ("circle", "disc"),
    "square": ("square",),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus sign"),
}
COLOURS = {
    "red": ("red",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
}
SIZES = {"small": ("small", "little", "tiny"), "large": ("large", "big")}
POSITIONS = {
    "top left": ("at the top left", "in the upper left corner"),
    "top right": ("at the top right", "in the upper right corner"),
    "bottom left": ("at the bottom left", "in the lower left corner"),
    "bottom right": ("at the bottom right", "in the lower right corner"),
    "centre": ("in the centre", "in the middle"),
}
TEXTURES = {
    "solid": ("solid", "filled"),
    "striped": ("striped",),
    "outlined": ("outlined", "hollow"),
}
ATTRIBUTES = (SHAPES, COLOURS, SIZES, POSITIONS, TEXTURES)
Combination = tuple[str, str, str, str, str]  # values in the order of ATTRIBUTES

SCENE_TEMPLATES = (
    "a {size} {texture} {colour} {shape} {position}",
    "a {size} {colour} {shape} {position}, {texture}",
    "{position}, a {texture} {colour} {shape}, {size}",
    "there is a {size} {colour} {texture} {shape} {position}",
    "a picture of a {texture} {size} {colour} {shape} {position}",
    "{colour} {shape}, {size} and {texture}, {position}",
)
NUM_HELD_OUT = 120  # number of held-out combinations among 900
NUM_VALIDATION_SCENES = 512

HUES = {"red": 0, "yellow": 55, "green": 120, "cyan": 180, "blue": 230, "purple": 290}  # degrees
RADII = {"small": (5.0, 6.0), "large": (8.2, 9.5)}  # pixels
CENTRES = {
    "top left": (9.5, 9.5),
    "top right": (22.5, 9.5),
    "bottom left": (9.5, 22.5),
    "bottom right": (22.5, 22.5),
    "centre": (16.0, 16.0),
}

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_TEMPLATES = (
    "a handwritten digit {name}",
    "the number {figure} written by hand",
    "a handwritten {figure}",
    "the digit {name}",
    "a scan of the number {name}",
    "someone wrote a {name}",
)
DIGIT_PROMPTS = ("a handwritten digit {}", "the digit {}", "a scan of the number {}")
NUM_TEST_DIGITS = 297
NUM_VALIDATION_DIGITS = 100


# -------------------------------------------------------------------------------------- scenes


def scene_combinations(seed: int) -> tuple[list[Combination], list[Combination]]:
    """Returns training and held-out combinations; training has every pair of values."""
    combinations = list(itertools.product(*ATTRIBUTES))
    order = np.random.default_rng([seed, 0]).permutation(len(combinations))
    num_left = Counter(pair for combination in combinations for pair in _value_pairs(combination))
    num_total = dict(num_left)
    held_out: set[Combination] = set()
    for index in order:
        pairs = _value_pairs(combinations[index])
        # At least three quarters of the scenes with a given pair of values stay in training.
        if len(held_out) < NUM_HELD_OUT and all(
            4 * (num_left[pair] - 1) >= 3 * num_total[pair] for pair in pairs
        ):
            num_left.subtract(pairs)
            held_out.add(combinations[index])
    kept = [combination for combination in combinations if combination not in held_out]
    return kept, [combination for combination in combinations if combination in held_out]


def _value_pairs(combination: Combination) -> list[tuple[str, str]]:
    return list(itertools.combinations(combination, 2))


def scene_items(
    combinations: Sequence[Combination], *, copies: int, num_captions: int, seed: Sequence[int]
) -> Iterator[DemoItem]:
    """Yields new images of the combinations, `copies` of each, in shuffled order."""
    every = [combination for combination in combinations for _ in range(copies)]
    order = np.random.default_rng(seed).permutation(len(every))
    for number, index in enumerate(order):
        rng = np.random.default_rng([*seed, number])
        image = draw_scene(every[index], rng)
        captions = [scene_caption(every[index], rng) for _ in range(num_captions)]
        yield DemoItem({f"{number:05d}.png": encode_png(image)}, tuple(dict.fromkeys(captions)))


def scene_caption(combination: Combination, rng: np.random.Generator) -> str:
    """Returns a random sentence that mentions all five attributes."""
    names = ("shape", "colour", "size", "position", "texture")
    words = {
        name: _choose(known[value], rng)
        for name, known, value in zip(names, ATTRIBUTES, combination, strict=True)
    }
    caption = _choose(SCENE_TEMPLATES, rng).format(**words)
    return re.sub(r"\ba (?=[aeiou])", "an ", caption)


def draw_scene(combination: Combination, rng: np.random.Generator) -> np.ndarray:
    """Draws a scene with jittered position, size and colour: uint8 [H, Wd, 3]."""
    shape, colour, size, position, texture = combination
    radius = rng.uniform(*RADII[size])
    centre = np.add(CENTRES[position], rng.uniform(-1.5, 1.5, 2))
    corners = _corners(shape, rng) * radius + centre
    coverage = _coverage(corners, texture, radius, rng)
    hue = (HUES[colour] + rng.uniform(-9, 9)) % 360 / 360
    return paint_on_background(coverage, hue=hue, rng=rng)


def paint_on_background(
    coverage: np.ndarray, *, hue: float, rng: np.random.Generator
) -> np.ndarray:
    """Paints a bright colour over a dull background, with grain: uint8 [H, Wd, 3].

    Args:
        coverage: painted fraction of each pixel, [H, Wd].
        hue: from 0 to 1.
        rng: random numbers of the image.
    """
    coverage = coverage[:, :, None]  # [H, Wd] -> [H, Wd, 1]
    paint = colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.8, 1))
    image = _background(rng) * (1 - coverage) + np.array(paint) * coverage
    image += rng.normal(0, rng.uniform(0.005, 0.03), image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _corners(shape: str, rng: np.random.Generator) -> np.ndarray:
    """Returns the corners, [corners, 2], of a slightly rotated shape with a radius of about 1."""
    if shape == "cross":
        arm, tip = 0.34, 1.0
        quarter = [(arm, -tip), (arm, -arm), (tip, -arm)]
        points = [_turned(point, 90 * turn) for turn in range(4) for point in quarter]
    else:
        number, scales, first = {
            "circle": (32, (0.95,), 0),
            "square": (4, (1.15,), 45),
            "triangle": (3, (1.2,), 0),
            "star": (10, (1.2, 0.5), 0),
        }[shape]
        points = [
            _turned((0, -scales[corner % len(scales)]), first + 360 * corner / number)
            for corner in range(number)
        ]
    angle = rng.uniform(-8, 8)
    return np.array([_turned(point, angle) for point in points])


def _turned(point: tuple[float, float], degrees: float) -> tuple[float, float]:
    cosine, sine = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (point[0] * cosine - point[1] * sine, point[0] * sine + point[1] * cosine)


def _coverage(
    corners: np.ndarray, texture: str, radius: float, rng: np.random.Generator
) -> np.ndarray:
    """Returns the painted fraction of each pixel: [H, Wd] in [0, 1]."""
    canvas = Image.new("L", (IMAGE_PIXELS * OVERSAMPLING,) * 2)
    draw = ImageDraw.Draw(canvas)
    points = [tuple(point) for point in corners * OVERSAMPLING]
    if texture == "outlined":
        draw.line(points + points[:2], fill=255, width=int(1.5 * OVERSAMPLING), joint="curve")
    else:
        draw.polygon(points, fill=255)
    painted = np.asarray(canvas, dtype=np.float64) / 255
    if texture == "striped":
        painted = painted * _stripes(radius, rng)
    return reduce_canvas(painted)


def reduce_canvas(painted: np.ndarray) -> np.ndarray:
    """Averages an oversampled canvas: [H * OVERSAMPLING, Wd * OVERSAMPLING] -> [H, Wd]."""
    size = IMAGE_PIXELS
    return painted.reshape(size, OVERSAMPLING, size, OVERSAMPLING).mean(axis=(1, 3))


def _stripes(radius: float, rng: np.random.Generator) -> np.ndarray:
    period = OVERSAMPLING * min(max(0.65 * radius, 3.2), 5.0)
    down, right = np.mgrid[: IMAGE_PIXELS * OVERSAMPLING, : IMAGE_PIXELS * OVERSAMPLING]
    angle = np.radians(rng.choice([0, 45, 90, 135]) + rng.uniform(-5, 5))
    phase = (down * np.cos(angle) + right * np.sin(angle)) / period + rng.uniform()
    return np.where(phase % 1 < 0.55, 1.0, 0.3)  # partly painted gaps keep the shape visible


def _background(rng: np.random.Generator) -> np.ndarray:
    """Returns a background, [H, Wd, 3]: a dull colour with a gradient, blotches and grain."""
    base = rng.uniform(0.1, 0.42) + rng.uniform(-0.06, 0.06, 3)
    down, right = np.mgrid[-1 : 1 : IMAGE_PIXELS * 1j, -1 : 1 : IMAGE_PIXELS * 1j]
    slope = rng.uniform(-0.1, 0.1, 2)
    blotches = rng.normal(0, rng.uniform(0.01, 0.06), (4, 4)).repeat(8, axis=0).repeat(8, axis=1)
    light = slope[0] * down + slope[1] * right + blotches
    return base + light[:, :, None]


# -------------------------------------------------------------------------------------- digits


def digit_splits(seed: int) -> dict[str, list[DemoItem]]:
    """Splits scikit-learn's digits into train, validation and test, balanced by class.

    Raises:
        InputError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(
            "the handwritten digits require scikit-learn: pip install 'isopair[demo]'"
        ) from None
    digits = load_digits()
    rng = np.random.default_rng([seed, 1])
    order = _alternate_classes(rng.permutation(len(digits.target)), digits.target)
    validation_end = NUM_TEST_DIGITS + NUM_VALIDATION_DIGITS
    indices = {
        "train": order[validation_end:],
        "validation": order[NUM_TEST_DIGITS:validation_end],
        "test": order[:NUM_TEST_DIGITS],
    }
    return {
        split: [
            _digit_item(number, digits.images[index], int(digits.target[index]), rng)
            for number, index in enumerate(chosen)
        ]
        for split, chosen in indices.items()
    }


def _alternate_classes(order: np.ndarray, targets: np.ndarray) -> list[int]:
    """Reorders indices: the first of every class, then the second of every class, and so on."""
    num_seen: Counter[int] = Counter()
    ranks = {}
    for index in order:
        ranks[int(index)] = num_seen[targets[index]]
        num_seen[targets[index]] += 1
    return sorted(ranks, key=ranks.__getitem__)


def _digit_item(number: int, scan: np.ndarray, digit: int, rng: np.random.Generator) -> DemoItem:
    small = Image.fromarray((scan * 255 / 16).astype(np.uint8))  # scans have values 0 to 16
    image = small.resize((IMAGE_PIXELS,) * 2, Image.Resampling.BICUBIC).convert("RGB")
    templates = rng.permutation(DIGIT_TEMPLATES)[:2]
    captions = [template.format(name=DIGIT_NAMES[digit], figure=digit) for template in templates]
    files = {f"{number:05d}.png": encode_png(np.asarray(image))}
    return DemoItem(files, tuple(captions), (DIGIT_NAMES[digit],))


def _choose(options: Sequence[str], rng: np.random.Generator) -> str:
    return options[rng.integers(len(options))]


def encode_png(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, Wd, 3], as a PNG file."""
    sink = io.BytesIO()
    Image.fromarray(image).save(sink, format="PNG", compress_level=6)
    return sink.getvalue()
