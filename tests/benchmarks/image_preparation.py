"""Images checked, scaled down and re-encoded per CPU second, compared with img2dataset's Resizer.

    pip install --target PEER img2dataset==1.47.0
    python -m tests.benchmarks.image_preparation PEER

Without the folder, only data_prep is measured. Both process the same JPEGs alternately; the best of
several rounds counts. data_prep does more: it finds damage within the scan, applies EXIF
orientation and colour profiles, and computes the perceptual hashes. Both check and keep images
whose shorter side is already 256. PSNR is relative to Pillow's LANCZOS of the whole image.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable, Sequence
from unittest.mock import patch

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw
from sklearn.datasets import load_sample_image

from data_prep.config import ImageOptions
from data_prep.media import image_preparation
from data_prep.media.image_preparation import prepare_image

SHORTER_SIDE = 256
QUALITY = 95
SIZES = ((341, 256), (1024, 683), (1024, 768), (1536, 1024), (2400, 1600))  # width, height
NUM_ROUNDS = 7


def main(peer_folder: str | None) -> None:
    options = ImageOptions(shorter_side=SHORTER_SIDE, quality=QUALITY)
    resize = None if peer_folder is None else build_resizer(peer_folder)
    pictures = {"photographs": photographs(), "drawn pictures": [drawn(n) for n in range(4)]}
    for size in SIZES:
        for name, originals in pictures.items():
            jpegs = [encode(each.resize(size, Image.Resampling.LANCZOS)) for each in originals]
            actions = {
                "isopair": lambda jpeg: prepare_image(jpeg, options).content,
                "without hashes": lambda jpeg: prepare_unhashed(jpeg, options),
            }
            actions |= {} if resize is None else {"img2dataset": resize}
            show(f"{name} of {size[0]} x {size[1]}", jpegs, actions)


def build_resizer(peer_folder: str) -> Callable[[bytes], bytes]:
    """Builds img2dataset's resizer for the same size and quality; it also keeps small JPEGs."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    sys.path.append(peer_folder)  # last: shared packages are data_prep's
    from img2dataset.resizer import Resizer

    resizer = Resizer(SHORTER_SIDE, "keep_ratio", True, encode_quality=QUALITY, skip_reencode=True)
    return lambda jpeg: resizer(io.BytesIO(jpeg))[0]


def prepare_unhashed(jpeg: bytes, options: ImageOptions) -> bytes:
    """Prepares an image without fingerprint, as img2dataset does."""
    with patch.object(image_preparation, "image_fingerprint", lambda pixels: {}):
        return prepare_image(jpeg, options).content


def photographs() -> list[Image.Image]:
    """Returns two photographs, and two parts of each."""
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    parts = [each.crop((x, 60, x + 400, 360)) for each in whole for x in (0, 240)]
    return whole + parts


def drawn(seed: int) -> Image.Image:
    """Draws forty discs of random colours on a gradient."""
    rng = np.random.default_rng(seed)
    picture = Image.linear_gradient("L").convert("RGB").resize((1024, 768))
    draw = ImageDraw.Draw(picture)
    for x, y, radius in rng.uniform((0, 0, 10), (1024, 768, 120), (40, 3)):
        draw.circle((x, y), radius, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return picture


def encode(picture: Image.Image) -> bytes:
    return simplejpeg.encode_jpeg(np.asarray(picture), quality=90, colorsubsampling="420")


def show(what: str, jpegs: Sequence[bytes], actions: dict[str, Callable[[bytes], bytes]]) -> None:
    seconds = {name: [] for name in actions}
    for _ in range(NUM_ROUNDS):
        for name, action in actions.items():
            start = time.process_time()
            for jpeg in jpegs:
                action(jpeg)
            seconds[name].append(time.process_time() - start)
    rates = {name: len(jpegs) / min(each) for name, each in seconds.items()}
    figures = [
        f"{name} {rate:,.0f}/s ({fidelity(jpegs, actions[name]):.1f} dB)"
        for name, rate in rates.items()
    ]
    *ours, last = rates.values()
    times = ", without hashes ".join(f"{rate / last:.2f} times" for rate in ours)
    ratio = f": {times}" if "img2dataset" in rates else ""
    kilobytes = np.mean([len(jpeg) for jpeg in jpegs]) / 1000
    print(f"{what}, {kilobytes:.0f} kB: {', '.join(figures)}{ratio}")


def fidelity(jpegs: Sequence[bytes], action: Callable[[bytes], bytes]) -> float:
    """Computes the mean PSNR in dB; infinite if nothing is re-encoded."""
    ratios = []
    for jpeg in jpegs:
        found = np.asarray(Image.open(io.BytesIO(action(jpeg))).convert("RGB"), np.float64)
        whole = Image.open(io.BytesIO(jpeg))
        expected = np.asarray(whole.resize(found.shape[1::-1], Image.Resampling.LANCZOS))
        error = np.mean((found - expected) ** 2)
        ratios.append(10 * np.log10(255**2 / error) if error else np.inf)
    return float(np.mean(ratios))


if __name__ == "__main__":
    main(*(sys.argv[1:] or [None]))
