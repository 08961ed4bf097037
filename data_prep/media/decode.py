"""Strict decoders of images and audio clips: damaged bytes raise, and sizes are bounded.

Decoded images are uint8 [H, Wd, 3], RGB; decoded audio is float32 [samples], mono, in [-1, 1].
"""

from __future__ import annotations

import io
import struct
import threading
from math import gcd
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_prep.media.audio_file import (
    MAX_AUDIO_VALUES,
    can_seek,
    open_audio,
    read_frames,
    read_waveform,
)
from data_prep.media.formats import FormatMismatchError, MediaError, image_format

# Larger images are rejected before decoding: a 0.5 MB PNG can claim any size.
MAX_PIXELS = 50_000_000
# Margin around a part to resample, in periods of the lower rate: more than soxr's filter needs.
RESAMPLING_MARGIN = 256
JPEG_EXTENSIONS = ("jpg", "jpeg")
# The only decoders of Pillow that untrusted bytes may reach.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
# Errors that Pillow's decoders raise on damaged bytes.
PILLOW_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    struct.error,
)


class PixelMemory:
    """Reusable memory for decoded images.

    New pages for each image would cost a tenth of the time of decoding a JPEG. An image is valid
    until the same thread decodes the next one.
    """

    def __init__(self) -> None:
        self._of_thread = threading.local()

    def room(self, num_bytes: int) -> np.ndarray:
        """Returns this thread's memory: uint8 [at least num_bytes]."""
        found = getattr(self._of_thread, "pixels", None)
        if found is None or found.nbytes < num_bytes:
            found = self._of_thread.pixels = np.empty(num_bytes, dtype=np.uint8)
        return found

    def __reduce__(self) -> tuple[type, tuple]:
        return PixelMemory, ()


def decode_image(
    content: bytes, extension: str, *, denominator: int = 1, memory: PixelMemory | None = None
) -> np.ndarray:
    """Decodes an image to uint8 [H, Wd, 3], with transparency on white.

    Args:
        content: bytes of a file.
        extension: required format.
        denominator: 1, 2, 4 or 8. Divides the height and width of a decoded JPEG, rounded up;
            other formats and CMYK JPEGs are decoded at full size.
        memory: memory that a JPEG's pixels may use.

    Raises:
        FormatMismatchError: if the format is not `extension`.
        MediaError: if the image is damaged, or above MAX_PIXELS.
    """
    _check_image_format(content, extension)
    if extension in JPEG_EXTENSIONS:
        return _decode_jpeg(content, denominator, memory)
    return _decode_with_pillow(content)


def _check_image_format(content: bytes, extension: str) -> None:
    found, expected = image_format(content), "jpg" if extension == "jpeg" else extension
    if found is not None and found != expected:
        raise FormatMismatchError(f"expected {expected} bytes, found {found}")


def jpeg_size(content: bytes) -> tuple[int, int]:
    """Reads (height, width) in pixels from a JPEG's header, 30 times faster than `image_size`.

    Raises:
        FormatMismatchError: if the format is not JPEG.
        MediaError: if the header is damaged, or claims more than MAX_PIXELS.
    """
    _check_image_format(content, "jpg")
    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(content)
    except ValueError as error:
        raise MediaError(f"not a readable JPEG: {error}") from None
    check_pixels(height, width, max_pixels=MAX_PIXELS)
    return height, width


def image_size(content: bytes) -> tuple[int, int]:
    """Reads (height, width) in pixels from an image's header.

    Raises:
        MediaError: if the bytes have no image header, or it claims more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise MediaError("not a readable image: no known image header") from None
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise MediaError(f"not a readable image: {error}") from None
    check_pixels(height, width, max_pixels=MAX_PIXELS)
    return height, width


def check_pixels(height: int, width: int, *, max_pixels: int) -> None:
    """Checks the size that an image's header claims.

    Raises:
        MediaError: with the reason too_many_pixels or no_pixels.
    """
    claim = f"image of {width} x {height} pixels; at most {max_pixels} are decoded"
    if height * width > max_pixels:
        raise MediaError(claim, reason="too_many_pixels")
    if min(height, width) < 1:
        raise MediaError(claim, reason="no_pixels")


def _decode_jpeg(content: bytes, denominator: int, memory: PixelMemory | None) -> np.ndarray:
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
        check_pixels(height, width, max_pixels=MAX_PIXELS)
        if color_space in ("CMYK", "YCCK"):  # simplejpeg converts them naively
            return _decode_with_pillow(content)
        options: dict[str, Any] = {}
        if denominator > 1:
            height, width = -(-height // denominator), -(-width // denominator)
            options = {"min_factor": denominator, "min_height": height, "min_width": width}
        if memory is not None:
            options["buffer"] = memory.room(height * width * 3)
        return simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True, **options)
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError(f"not a readable JPEG: {error}") from None


def _decode_with_pillow(content: bytes) -> np.ndarray:
    image_size(content)
    try:
        with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                white = Image.new("RGBA", rgba.size, "white")
                image = Image.alpha_composite(white, rgba)
            elif image.mode.startswith("I;16"):  # Pillow clips 16 bits on conversion
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except PILLOW_ERRORS as error:
        raise MediaError(f"not a readable image: {error}") from None


def decode_audio(
    content: bytes, *, sample_rate_hz: int | None, extension: str | None = None
) -> np.ndarray:
    """Decodes a clip to float32 [samples], with averaged channels, at a sample rate.

    Args:
        content: bytes of a file.
        sample_rate_hz: sample rate of the result; None for the clip's own.
        extension: required format; None for any.

    Raises:
        FormatMismatchError: if the format is not `extension`.
        MediaError: if the clip is damaged, empty, shorter than its header says, not finite, or too
            long.
    """
    waveform, rate = read_waveform(content, extension=extension)
    mono = mean_of_channels(waveform)
    if sample_rate_hz is not None:
        mono = resample(mono, rate, sample_rate_hz)
    return np.ascontiguousarray(mono, dtype=np.float32)


def decode_audio_part(
    content: bytes, *, sample_rate_hz: int, num_samples: int, place: float
) -> np.ndarray:
    """Decodes a part of a clip, float32 [num_samples], or all of a shorter clip.

    Little more than the part is decoded. The samples equal those of `decode_audio` to the bit; if
    the clip is resampled or Opus, they differ by less than -100 dB.

    Args:
        content: bytes of a file.
        sample_rate_hz: sample rate of the result.
        num_samples: length of the part, at that rate.
        place: position among the possible parts, from 0 (the first) to below 1 (the last).

    Raises:
        MediaError: as `decode_audio`, but damage elsewhere in the clip may be missed.
    """
    with open_audio(content) as file:
        rate, num_frames = file.samplerate, file.frames
        surplus = num_frames * sample_rate_hz // rate - num_samples
        start = int(place * (max(0, surplus) + 1))
        first, last = _frames_of_part(start, start + num_samples, rate, sample_rate_hz)
        last = min(last, num_frames)
        if can_seek(file):
            file.seek(first)
            waveform = read_frames(file, last - first)
        else:
            waveform = read_frames(file, last)[first:]
    mono = resample(mean_of_channels(waveform), rate, sample_rate_hz)
    start -= first * sample_rate_hz // rate
    return np.ascontiguousarray(mono[start : start + num_samples], dtype=np.float32)


def _frames_of_part(start: int, stop: int, rate: int, sample_rate_hz: int) -> tuple[int, int]:
    """Returns the frames [first, last) at `rate` needed for samples [start, stop) of the result.

    Both rates have a sample at the time of the first frame. Thus the part's samples have the same
    times as those of the whole clip.
    """
    if rate == sample_rate_hz:
        return start, stop
    margin = -(-RESAMPLING_MARGIN * max(rate, sample_rate_hz) // sample_rate_hz)
    step = rate // gcd(rate, sample_rate_hz)
    first = max(0, start * rate // sample_rate_hz - margin) // step * step
    return first, -(-stop * rate // sample_rate_hz) + margin


def mean_of_channels(waveform: np.ndarray) -> np.ndarray:
    """Averages channels: float32 [samples, channels] -> [samples].

    Summing columns is 19 times faster than numpy's mean along so short an axis, with equal bits.
    """
    total = waveform[:, 0]
    for channel in range(1, waveform.shape[1]):
        total = total + waveform[:, channel]
    return total / np.float32(waveform.shape[1])


def resample(waveform: np.ndarray, rate: int, sample_rate_hz: int) -> np.ndarray:
    """Resamples float32 [samples] or [samples, channels]; returns it unchanged at an equal rate.

    Raises:
        MediaError: if the clip is too short for one sample, or too long at the new rate.
    """
    import soxr

    if rate == sample_rate_hz:
        return waveform
    if waveform.size * sample_rate_hz > MAX_AUDIO_VALUES * rate:
        raise MediaError(
            f"audio of {len(waveform)} frames at {rate} Hz is too long at {sample_rate_hz} Hz; "
            f"at most {MAX_AUDIO_VALUES} values are made",
            reason="too_long",
        )
    resampled = soxr.resample(waveform, rate, sample_rate_hz, quality="HQ")
    if not len(resampled):
        raise MediaError(
            f"audio of {len(waveform)} frames at {rate} Hz is too short to resample",
            reason="no_samples",
        )
    return resampled
