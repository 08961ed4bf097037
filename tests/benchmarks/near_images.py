"""Near-duplicate images: recall per edit, precision over all pairs, and speed.

    python -m tests.benchmarks.near_images [FOLDER]

The images are disjoint parts of photographs, pairs of scenes that differ in one attribute, and
handwritten digits. The photographs are those of scikit-learn, of scikit-image if it is installed,
and of FOLDER, which must not contain duplicates. If imagehash is installed, its phash is measured,
too.
"""

from __future__ import annotations

import importlib.util
import io
import resource
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_images

from data_prep.config import NearMedia
from data_prep.dedup.crop_windows import window_hashes
from data_prep.dedup.near_images import ImageHashes, Matches, near_images
from data_prep.demo.images import ATTRIBUTES, digit_splits, draw_scene, scene_combinations
from data_prep.media.image_fingerprint import SIGNATURE_BYTES, image_fingerprint

MOST_PARTS, NUM_SCENE_PAIRS, NUM_DIGITS = 150, 60, 80
# The same picture in other colours, or the other view of a stereo pair.
NOT_DIFFERENT = ("chessboard_RGB.png", "motorcycle_right.png")
# Their quarters are the same picture, or one of its mirror images.
SYMMETRIC = ("chessboard_GRAY.png", "phantom.png")
NUM_HASHES = 1_000_000
WORKERS = 2


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    report_speed()
    report_search()
    report_edits([*photographs(folder), *scenes(), *digits()])


# ------------------------------------------------------------------------------------ pictures


def photographs(folder: Path | None) -> list[tuple[str, Image.Image]]:
    pictures = {str(n): Image.fromarray(p) for n, p in enumerate(load_sample_images().images)}
    folders = [] if folder is None else [folder]
    found = importlib.util.find_spec("skimage")
    if found is not None:
        folders.append(Path(found.origin).parent / "data")
    for path in sorted(path for each in folders for path in each.glob("*.*g")):
        if path.name not in NOT_DIFFERENT:
            rgba = Image.open(path).convert("RGBA")
            white = Image.new("RGBA", rgba.size, "white")
            pictures[path.name] = Image.alpha_composite(white, rgba).convert("RGB")
    wholes = [picture for name, picture in pictures.items() if name not in SYMMETRIC]
    parts = [part for picture in wholes for part in quarters(picture)][:MOST_PARTS]
    return [("photograph", picture) for picture in [*pictures.values(), *parts]]


def quarters(picture: Image.Image) -> list[Image.Image]:
    width, height = picture.width // 2, picture.height // 2
    corners = [(x, y) for y in (0, height) for x in (0, width)]
    large = min(width, height) >= 100
    return [picture.crop((x, y, x + width, y + height)) for x, y in corners if large]


def scenes() -> list[tuple[str, Image.Image]]:
    rng = np.random.default_rng(0)
    combinations = scene_combinations(0)[0]
    pictures = []
    for number in rng.choice(len(combinations), NUM_SCENE_PAIRS, replace=False):
        scene = list(combinations[number])
        attribute = rng.integers(len(scene))
        values = [value for value in ATTRIBUTES[attribute] if value != scene[attribute]]
        other = [*scene[:attribute], str(rng.choice(values)), *scene[attribute + 1 :]]
        pictures += [Image.fromarray(draw_scene(tuple(each), rng)) for each in (scene, other)]
    return [("drawn", picture) for picture in pictures]


def digits() -> list[tuple[str, Image.Image]]:
    chosen = digit_splits(0)["train"][:NUM_DIGITS]
    return [("drawn", Image.open(io.BytesIO(each.content)).convert("RGB")) for each in chosen]


# --------------------------------------------------------------------------------------- edits


def saved(picture: Image.Image, image_format: str, quality: int) -> Image.Image:
    sink = io.BytesIO()
    picture.save(sink, image_format, quality=quality)
    return Image.open(sink).convert("RGB")


def scaled(picture: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, Image.Resampling.LANCZOS)


def cropped(
    picture: Image.Image, rng: np.random.Generator, *, area: float = 0, side: float = 0
) -> Image.Image:
    """Cuts out a random part that lacks a fraction of the area, or of each side."""
    fraction = 1 - side if side else np.sqrt(1 - area)
    width, height = round(picture.width * fraction), round(picture.height * fraction)
    x, y = rng.integers(picture.width - width + 1), rng.integers(picture.height - height + 1)
    return picture.crop((x, y, x + width, y + height))


def colours(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    for change in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        picture = change(picture).enhance(rng.uniform(0.85, 1.15))
    return picture


def bordered(picture: Image.Image, fraction: float) -> Image.Image:
    return ImageOps.expand(picture, border=round(fraction * min(picture.size)), fill="white")


MIRROR = Image.Transpose.FLIP_LEFT_RIGHT
EDITS = {
    "jpeg 30": lambda picture, rng: saved(picture, "JPEG", 30),
    "jpeg 60": lambda picture, rng: saved(picture, "JPEG", 60),
    "jpeg 95": lambda picture, rng: saved(picture, "JPEG", 95),
    "webp 50": lambda picture, rng: saved(picture, "WEBP", 50),
    "scaled to 0.25": lambda picture, rng: scaled(picture, 0.25),
    "scaled to 0.5": lambda picture, rng: scaled(picture, 0.5),
    "scaled to 2": lambda picture, rng: scaled(picture, 2),
    "mirrored": lambda picture, rng: picture.transpose(MIRROR),
    "brightness 0.85": lambda picture, rng: ImageEnhance.Brightness(picture).enhance(0.85),
    "brightness 1.15": lambda picture, rng: ImageEnhance.Brightness(picture).enhance(1.15),
    "contrast 1.15": lambda picture, rng: ImageEnhance.Contrast(picture).enhance(1.15),
    "saturation 0.85": lambda picture, rng: ImageEnhance.Color(picture).enhance(0.85),
    "all three colours": colours,
    "cropped, 5 % of sides": lambda picture, rng: cropped(picture, rng, side=0.05),
    "cropped, up to 10 % area": lambda p, rng: cropped(p, rng, area=rng.uniform(0.005, 0.1)),
    "cropped, 10 % of area": lambda picture, rng: cropped(picture, rng, area=0.1),
    "cropped, 10 % of sides": lambda picture, rng: cropped(picture, rng, side=0.1),
    "mirrored, cropped 5 %": lambda p, rng: cropped(p.transpose(MIRROR), rng, side=0.05),
    "cropped 5 %, 0.5, jpeg": lambda p, rng: saved(
        scaled(cropped(p, rng, side=0.05), 0.5), "JPEG", 60
    ),
}
HEAVY_EDITS = {
    "greyscale": lambda picture, rng: picture.convert("L").convert("RGB"),
    "cropped, 20 % of sides": lambda picture, rng: cropped(picture, rng, side=0.2),
    "rotated by 1 degree": lambda picture, rng: picture.rotate(1, Image.Resampling.BICUBIC),
    "rotated by 5 degrees": lambda picture, rng: picture.rotate(5, Image.Resampling.BICUBIC),
    "rotated by 90 degrees": lambda picture, rng: picture.transpose(Image.Transpose.ROTATE_90),
    "upside down": lambda picture, rng: picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
    "white border, 5 %": lambda picture, rng: bordered(picture, 0.05),
    "inverted colours": lambda picture, rng: ImageOps.invert(picture),
}


def report_edits(pictures: list[tuple[str, Image.Image]]) -> None:
    rng = np.random.default_rng(0)
    edits = {"none": lambda picture, rng: picture, **EDITS, **HEAVY_EDITS}
    hashes = hashes_of([edit(each, rng) for edit in edits.values() for _, each in pictures])
    num = len(pictures)
    matches = found_in(hashes)
    classes = np.arange(num * len(edits))
    classes[matches.members] = matches.member_firsts
    pairs = set(zip(matches.left.tolist(), matches.right.tolist(), strict=True))
    is_photograph = np.array([kind == "photograph" for kind, _ in pictures])
    num_photographs = int(is_photograph.sum())
    print(f"{num_photographs} photographs and their parts, {num - num_photographs} drawn pictures")
    print(f"{'edit':<26}{'photographs':>12}{'drawn':>8}")
    recalls = []
    for index, name in enumerate(edits):
        ends = zip(classes[:num].tolist(), classes[index * num :][:num].tolist(), strict=True)
        is_found = np.array([a == b or (a, b) in pairs or (b, a) in pairs for a, b in ends])
        if name != "none":
            shares = is_found[is_photograph].mean(), is_found[~is_photograph].mean()
            print(f"{name:<26}{shares[0]:>12.3f}{shares[1]:>8.3f}")
            recalls += [is_found.mean()] * (name in EDITS)
    print(f"all light edits: recall {np.mean(recalls):.4f}; {precision(matches, classes, num)}")


def precision(matches: Matches, classes: np.ndarray, num: int) -> str:
    """Computes the precision over all found pairs of originals and edits."""
    sizes = np.bincount(classes, minlength=len(classes))
    is_right = matches.left % num == matches.right % num
    weights = sizes[matches.left] * sizes[matches.right]
    is_class_right = matches.members % num == matches.member_firsts % num
    num_right = int(weights[is_right].sum() + is_class_right.sum())
    num_wrong = int(weights[~is_right].sum() + (~is_class_right).sum())
    return (
        f"precision {num_right / (num_right + num_wrong):.4f} over all pairs of originals and "
        f"copies ({num_wrong:,} of {num_right + num_wrong:,} wrong)"
    )


def hashes_of(pictures: list[Image.Image]) -> ImageHashes:
    prints = [image_fingerprint(np.asarray(picture)) for picture in pictures]
    return ImageHashes(
        np.array([each["phash"] for each in prints], np.uint64),
        np.array([each["phash_mirrored"] for each in prints], np.uint64),
        np.stack([np.frombuffer(each["signature"], np.uint8) for each in prints]),
    )


def found_in(hashes: ImageHashes) -> Matches:
    options = NearMedia()
    return near_images(
        hashes,
        is_reference=np.zeros(len(hashes.phash), bool),
        max_distance=options.image_max_distance,
        min_similarity=options.image_min_similarity,
        workers=WORKERS,
    )


# --------------------------------------------------------------------------------------- speed


def report_speed() -> None:
    photograph = Image.fromarray(load_sample_images().images[0])
    for side in (256, 1024):
        picture = photograph.resize((side, side))
        pixels = np.asarray(picture)
        ours = microseconds(lambda pixels=pixels: image_fingerprint(pixels))
        print(f"fingerprint of {side} x {side} pixels: {ours:.0f} us of CPU", end="")
        if importlib.util.find_spec("imagehash") is None:
            print("; imagehash is not installed")
            continue
        import imagehash

        print(f"; phash of imagehash {microseconds(lambda p=picture: imagehash.phash(p)):.0f} us")


def microseconds(action) -> float:
    """Measures CPU microseconds per run, in the best of five series of 100 runs."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        for _ in range(100):
            action()
        seconds.append(time.process_time() - start)
    return min(seconds) * 1e6 / 100


def report_search() -> None:
    """Measures the search among thumbnails; a fifth are blank, a tenth are copies."""
    hashes = random_hashes(np.random.default_rng(0))
    before, start, cpu = peak_mb(), time.perf_counter(), time.process_time()
    matches = found_in(hashes)
    print(
        f"search among {NUM_HASHES:,} pictures: {time.perf_counter() - start:.0f} s "
        f"({time.process_time() - cpu:.0f} s of CPU, {WORKERS} threads), {len(matches.left):,} "
        f"pairs, {len(matches.members):,} in classes, {peak_mb():,.0f} MB at most "
        f"({before:,.0f} MB before)"
    )


def random_hashes(rng: np.random.Generator) -> ImageHashes:
    down, right = np.mgrid[:16, :16]
    amplitudes = (210 / (1 + down**2 + right**2) ** 0.6).astype(np.float32)
    amplitudes[0, 0] = 0
    cosines = np.cos(np.pi * down * (2 * right + 1) / 32).astype(np.float32)
    signatures = np.full((NUM_HASHES, SIGNATURE_BYTES), 128, np.uint8)
    num_blank, num_copies = NUM_HASHES // 5, NUM_HASHES // 10
    for first in range(num_blank, NUM_HASHES, 20_000):
        part = signatures[first : first + 20_000]
        waves = rng.normal(size=(len(part), 16, 16)).astype(np.float32) * amplitudes
        pixels = 128 + cosines.T @ waves @ cosines
        part[:, :256] = pixels.clip(0, 255).reshape(len(part), 256)
        part[:, 256:] = rng.normal(128, 10, (len(part), 128)).clip(0, 255)
    signatures[-num_copies:] = signatures[num_blank : num_blank + num_copies]
    mirrored = signatures.copy()
    mirrored[:, :256] = signatures[:, :256].reshape(-1, 16, 16)[:, :, ::-1].reshape(-1, 256)
    phash = window_hashes(signatures, 0)
    phash[-num_copies:] ^= np.uint64(1) << rng.integers(0, 64, num_copies, dtype=np.uint64)
    return ImageHashes(phash, window_hashes(mirrored, 0), signatures)


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000


if __name__ == "__main__":
    main()
