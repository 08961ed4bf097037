"""Colour conversion of decoded images: transparency to white, and all colour spaces to sRGB."""

from __future__ import annotations

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from data_prep.media.formats import MediaError

# A profile that changes no colour by more than this is a variant of sRGB.
MAX_SRGB_DIFFERENCE = 2
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}
PLAIN_MODES = tuple(PROFILE_SPACES)


def has_alpha(image: Image.Image) -> bool:
    """Returns True if an image has transparency: an alpha channel or a transparent colour."""
    return image.has_transparency_data


def flatten(image: Image.Image) -> Image.Image:
    """Converts an image to mode L, RGB or CMYK with 8 bits per channel, transparency on white.

    Raises:
        MediaError: if the mode is unsupported, such as float or Lab; the reason is
            unsupported_colors.
    """
    if image.mode.startswith("I;16"):
        return _upper_bits(image)
    if image.mode in ("I", "F", "LAB", "HSV"):
        raise MediaError(
            f"image mode {image.mode} is not supported: its values have no standard range",
            reason="unsupported_colors",
        )
    if has_alpha(image):
        is_gray = image.mode in ("1", "L", "LA")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("L" if is_gray else "RGB")
    if image.mode in PLAIN_MODES:
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _upper_bits(image: Image.Image) -> Image.Image:
    # Pillow would clip 16-bit values to 255.
    values = np.asarray(image)
    gray = (values >> 8).astype(np.uint8)
    if "transparency" in image.info:
        gray[values == image.info["transparency"]] = 255
    return Image.fromarray(gray)


def to_srgb(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """Converts an image to sRGB with its profile; ignores a damaged or mismatched profile."""
    transform = color_transform(icc_profile, image.mode)
    if transform is not None:
        return transform.apply(image)
    return image if image.mode == "RGB" else image.convert("RGB")


@lru_cache(maxsize=64)
def color_transform(icc_profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Builds the transform from a mode and profile to sRGB; None if no transform is needed."""
    if not icc_profile:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        if profile.profile.xcolor_space.strip() != PROFILE_SPACES.get(mode):
            return None
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.buildTransform(profile, srgb, mode, "RGB")
        colors = _color_samples(mode)
        found = np.asarray(transform.apply(colors))
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    if mode != "CMYK":
        expected = np.asarray(colors.convert("RGB"))
        if np.abs(found.astype(int) - expected).max() <= MAX_SRGB_DIFFERENCE:
            return None
    return transform


def _color_samples(mode: str) -> Image.Image:
    """Returns an image of evenly spaced colours of a mode."""
    if mode == "L":
        return Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    channels = np.meshgrid(*[levels] * len(mode), indexing="ij")
    colors = np.stack(channels, axis=-1).reshape(len(levels), -1, len(mode))
    return Image.fromarray(colors, mode=mode)
