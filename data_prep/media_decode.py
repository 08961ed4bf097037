"""Decodes the bytes of an image or an audio clip, strictly: damaged bytes raise, sizes are bounded.

Decoded images are uint8 [H, Wd, 3], RGB; decoded audio is float32 [samples], mono, in [-1, 1].
"""

from __future__ import annotations

import io

import numpy as np
import simplejpeg
from PIL import Image

# Refused before decoding: a 0.5 MB PNG can claim any size.
MAX_PIXELS = 50_000_000
MAX_AUDIO_SECONDS = 3600.0


class MediaError(ValueError):
    """The bytes are not what their extension says, are damaged, or claim too large a size."""


def decode_image(content: bytes, extension: str) -> np.ndarray:
    """uint8 [H, Wd, 3] of an encoded image; transparency is laid on white.

    Raises:
        MediaError: damaged, of another format than `extension`, or above MAX_PIXELS.
    """
    if extension in ("jpg", "jpeg"):
        return _decode_jpeg(content)
    return _decode_with_pillow(content)


def image_size(content: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone.

    Raises:
        MediaError: the header is not an image's, or claims more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            width, height = image.size
    except (OSError, ValueError, Image.DecompressionBombError, SyntaxError) as error:
        raise MediaError(f"not a readable image: {error}") from None
    _check_pixels(height, width)
    return height, width


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS or min(height, width) < 1:
        raise MediaError(f"image of {width} x {height} pixels; at most {MAX_PIXELS} are decoded")


def _decode_jpeg(content: bytes) -> np.ndarray:
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
        _check_pixels(height, width)
        if color_space == "CMYK":  # simplejpeg converts CMYK naively
            return _decode_with_pillow(content)
        return simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True)
    except MediaError:
        raise
    except ValueError as error:
        raise MediaError(f"not a readable JPEG: {error}") from None


def _decode_with_pillow(content: bytes) -> np.ndarray:
    image_size(content)
    try:
        with Image.open(io.BytesIO(content)) as image:
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = image.convert("RGBA")
                white = Image.new("RGBA", rgba.size, "white")
                image = Image.alpha_composite(white, rgba)
            elif image.mode.startswith("I;16"):  # Pillow clips 16 bits on conversion
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise MediaError(f"not a readable image: {error}") from None


def decode_audio(content: bytes, *, sample_rate_hz: int) -> np.ndarray:
    """float32 [samples] of an encoded clip: channels averaged, resampled to `sample_rate_hz`.

    Raises:
        MediaError: damaged, empty, shorter than its header says, not finite, or too long.
    """
    import soundfile
    import soxr

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            num_frames, rate = file.frames, file.samplerate
            if rate < 1 or not 0 < num_frames <= MAX_AUDIO_SECONDS * rate:
                raise MediaError(
                    f"audio of {num_frames} frames at {rate} Hz; expected above 0 and at most "
                    f"{MAX_AUDIO_SECONDS:.0f} s"
                )
            waveform = file.read(dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(f"not readable audio: {error}") from None
    if len(waveform) != num_frames:
        raise MediaError(f"audio ends after {len(waveform)} of {num_frames} frames")
    if not np.isfinite(waveform).all():
        raise MediaError("audio holds values that are not finite")
    mono = waveform.mean(axis=1)
    if rate != sample_rate_hz:
        mono = soxr.resample(mono, rate, sample_rate_hz, quality="HQ")
    return np.ascontiguousarray(mono, dtype=np.float32)


def audio_seconds(content: bytes) -> tuple[float, int]:
    """(length in seconds, sample rate in Hz), from the header alone.

    Raises:
        MediaError: the header is not an audio file's.
    """
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            return file.frames / file.samplerate, file.samplerate
    except (soundfile.SoundFileError, RuntimeError, ZeroDivisionError) as error:
        raise MediaError(f"not readable audio: {error}") from None
