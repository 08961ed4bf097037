"""Preparation of an image: check, decode once, and keep unchanged or re-encode.

The image is decoded only once, for the check, the re-encoding and the fingerprint. JPEGs are
decoded with simplejpeg, because it reports damage that Pillow hides.

A large JPEG is decoded at one to four eighths of its size (scaled DCT), but not below the requested
size, and then resampled. A JPEG that is kept is decoded at the smallest size that its fingerprint
allows.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import simplejpeg
from PIL import ExifTags, Image

from data_prep.config import ImageOptions
from data_prep.media.decode import MAX_PIXELS, PILLOW_ERRORS, check_pixels
from data_prep.media.formats import (
    STORED_FORMATS,
    MediaError,
    PreparedMedia,
    check_kind,
    check_stored,
)
from data_prep.media.image_color import color_transform, flatten, has_alpha, to_srgb
from data_prep.media.image_container import open_image
from data_prep.media.image_fingerprint import image_fingerprint

# Decoding at five to seven eighths is slower than at full size.
DCT_EIGHTHS = (1, 2, 3, 4)
FINGERPRINT_SIDE = 128  # minimum shorter side for a fingerprint, in pixels
JPEG_MODES = {"Gray": "L", "CMYK": "CMYK", "YCCK": "CMYK"}  # all others are decoded to RGB
TRANSPOSITIONS = {  # EXIF orientation -> operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
LONGEST_SIDES = {"jpg": 65_500, "webp": 16_383, "png": 2**31 - 1}  # limits of the formats in pixels
PNG_BIT_DEPTH = 24  # offset of the bit depth in the file


def prepare_image(content: bytes, options: ImageOptions) -> PreparedMedia:
    """Returns the stored form of an image, with the columns of shards.columns.MEASURES["image"].

    Raises:
        MediaError: if the image is damaged or animated, has an unknown format, or exceeds a limit.
    """
    source_format = check_kind(content, "image")
    check_stored(source_format, "image", options.reencode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about metadata that does not affect pixels
        with open_image(content, source_format, max_pixels=options.max_pixels) as image:
            width, height = image.size
            try:
                stored, extension, pixels = _stored(content, source_format, image, options)
            except MediaError:
                raise
            except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
                raise MediaError(f"unreadable {source_format}: {error}") from None
    is_reencoded = stored is not content
    measures = {
        "height": pixels.shape[0] if is_reencoded else height,
        "width": pixels.shape[1] if is_reencoded else width,
        "source_height": height,
        "source_width": width,
        "is_reencoded": is_reencoded,
        **image_fingerprint(pixels),
    }
    return PreparedMedia(stored, extension, measures, _filters(height, width, options))


def _filters(height: int, width: int, options: ImageOptions) -> tuple[str, ...]:
    # Filters use the size before re-encoding.
    short, long = sorted((height, width))
    found = ["image_too_small"] if short < options.min_side else []
    if options.max_aspect_ratio is not None and long > options.max_aspect_ratio * short:
        found.append("image_aspect_ratio")
    return tuple(found)


def _stored(
    content: bytes, source_format: str, image: Image.Image, options: ImageOptions
) -> tuple[bytes, str, np.ndarray]:
    """Returns the bytes to store, their extension, and their pixels: uint8 [H, Wd, 3]."""
    is_animated = source_format != "jpg" and getattr(image, "is_animated", False)
    if is_animated and not options.first_frame:
        raise MediaError(
            f"{source_format} with several frames or pages; first_frame=true keeps the first",
            reason="animated",
        )
    bit_depth = content[PNG_BIT_DEPTH] if source_format == "png" else 8
    if source_format != "jpg":
        image.load()  # required before reading EXIF, which may follow the pixels in a PNG
    transposition = TRANSPOSITIONS.get(image.getexif().get(ExifTags.Base.Orientation))
    size = scaled_size(image.height, image.width, options.shorter_side)
    check_pixels(*size, max_pixels=MAX_PIXELS)  # training does not decode larger images
    is_as_asked = (
        source_format in STORED_FORMATS["image"]
        and not is_animated
        and size == (image.height, image.width)
        and transposition is None
        and bit_depth <= 8
        and _is_plain_color(image)
    )
    if options.reencode == "never" or (options.reencode == "if_needed" and is_as_asked):
        return content, source_format, _checked_pixels(content, source_format, image)
    icc_profile = image.info.get("icc_profile")
    decoded = to_srgb(_decode(content, source_format, image, size=size), icc_profile)
    if transposition is not None:
        decoded = decoded.transpose(transposition)
    pixels = np.asarray(decoded)
    return encode_image(pixels, options), options.format, pixels


def scaled_size(height: int, width: int, shorter_side: int | None) -> tuple[int, int]:
    """Computes (height, width) with the shorter side reduced to at most `shorter_side`."""
    shorter = min(height, width)
    if shorter_side is None or shorter <= shorter_side:
        return height, width
    return round(height * shorter_side / shorter), round(width * shorter_side / shorter)


def _is_plain_color(image: Image.Image) -> bool:
    """Returns True for opaque sRGB or grey, which all decoders convert to the same colours."""
    if image.mode not in ("1", "L", "P", "RGB") or has_alpha(image):
        return False
    return color_transform(image.info.get("icc_profile"), _profile_mode(image)) is None


def _profile_mode(image: Image.Image) -> str:
    return "L" if image.mode in ("1", "L") else "RGB"


def _checked_pixels(content: bytes, source_format: str, image: Image.Image) -> np.ndarray:
    """Decodes an image that is kept, large enough for its fingerprint: uint8 [H, Wd, 3].

    A JPEG's scan is read to its end at any reduction, so that damage is detected.
    """
    if source_format == "jpg" and image.mode != "CMYK":
        eighths = _smallest_eighths(image.height, image.width, (FINGERPRINT_SIDE, FINGERPRINT_SIDE))
        return simplejpeg.decode_jpeg(
            content,
            colorspace="RGB",
            min_height=-(-image.height * eighths // 8),
            min_width=-(-image.width * eighths // 8),
            strict=True,
        )
    decoded = _decode(content, source_format, image, size=(image.height, image.width))
    return np.asarray(decoded.convert("RGB"))


def _smallest_eighths(height: int, width: int, size: tuple[int, int]) -> int:
    """Returns the smallest number n such that n eighths of a JPEG's size are at least `size`."""
    return next(
        (n for n in DCT_EIGHTHS if height * n >= 8 * size[0] and width * n >= 8 * size[1]), 8
    )


def _decode(
    content: bytes, source_format: str, image: Image.Image, *, size: tuple[int, int]
) -> Image.Image:
    """Decodes an image at `size` (height, width), in mode L, RGB or CMYK."""
    if source_format == "jpg":
        decoded, box = _decode_jpeg(content, size)
    else:
        decoded, box = flatten(image), (0, 0, *image.size)
    height, width = size
    if decoded.size == (width, height):
        return decoded
    return decoded.resize((width, height), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def _decode_jpeg(
    content: bytes, size: tuple[int, int]
) -> tuple[Image.Image, tuple[float, float, float, float]]:
    """Decodes a JPEG at the smallest scale that is not below `size`.

    A reduced side is rounded up unless the full length is a multiple of 8. If it is rounded up, the
    last row or column lies partly outside the source.

    Returns:
        The image, and the box in it that the source covers.
    """
    height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
    mode = JPEG_MODES.get(color_space, "RGB")
    eighths = _smallest_eighths(height, width, size)
    pixels = simplejpeg.decode_jpeg(
        content,
        colorspace="GRAY" if mode == "L" else mode,
        min_height=-(-height * eighths // 8),
        min_width=-(-width * eighths // 8),
        strict=True,
    )
    if mode == "CMYK":
        pixels = 255 - pixels  # by Adobe's convention, which all programs follow, 255 means no ink
    if mode == "L":
        pixels = pixels[:, :, 0]
    decoded = Image.frombuffer(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels))
    return decoded, (0, 0, width * eighths / 8, height * eighths / 8)


def encode_image(pixels: np.ndarray, options: ImageOptions) -> bytes:
    """Encodes uint8 [H, Wd, 3] in the configured format and quality, without metadata.

    Raises:
        MediaError: if a side exceeds the format's limit; the reason is too_long_side.
    """
    height, width, _ = pixels.shape
    longest = LONGEST_SIDES[options.format]
    if max(height, width) > longest:
        raise MediaError(
            f"{width} x {height} pixels; expected at most {longest} per side of a {options.format}",
            reason="too_long_side",
        )
    if options.format == "jpg":
        return simplejpeg.encode_jpeg(pixels, quality=options.quality, colorsubsampling="420")
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, options.format.upper(), quality=options.quality)
    return sink.getvalue()
