"""Decodes the bytes of an image or an audio clip, strictly: damaged bytes raise, sizes are bounded.

Decoded images are uint8 [H, Wd, 3], RGB; decoded audio is float32 [samples], mono, in [-1, 1].
"""

from __future__ import annotations

import io
import struct

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from data_prep.audio_container import check_is_whole
from data_prep.media_format import FormatMismatchError, MediaError, image_format

# Refused before decoding: a 0.5 MB PNG can claim any size.
MAX_PIXELS = 50_000_000
MAX_AUDIO_SECONDS = 3600.0
# Of all channels; a clip of 6 MB can claim billions, at rates that no ear needs.
MAX_AUDIO_VALUES = 400_000_000
MIN_SAMPLE_RATE_HZ, MAX_SAMPLE_RATE_HZ = 1000, 655_350  # the second is the most that FLAC holds
# The only decoders of Pillow that bytes from elsewhere may reach.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
SOUNDFILE_FORMATS = {
    "wav": ("WAV", "WAVEX", "RF64"),
    "flac": ("FLAC",),
    "mp3": ("MP3", "MPEG"),
    "ogg": ("OGG",),
    "opus": ("OGG",),
    "aiff": ("AIFF",),
}
# What Pillow's decoders raise on damaged bytes.
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


def decode_image(content: bytes, extension: str) -> np.ndarray:
    """uint8 [H, Wd, 3] of an encoded image; transparency is laid on white.

    Raises:
        FormatMismatchError: of another format than `extension`.
        MediaError: damaged, or above MAX_PIXELS.
    """
    found, expected = image_format(content), "jpg" if extension == "jpeg" else extension
    if found is not None and found != expected:
        raise FormatMismatchError(f"expected {expected} bytes, found {found}")
    if extension in ("jpg", "jpeg"):
        return _decode_jpeg(content)
    return _decode_with_pillow(content)


def image_size(content: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header alone.

    Raises:
        MediaError: the header is not an image's, or claims more than MAX_PIXELS.
    """
    try:
        with Image.open(io.BytesIO(content), formats=PILLOW_FORMATS) as image:
            width, height = image.size
    except UnidentifiedImageError:
        raise MediaError("not a readable image: its header is none of an image's") from None
    except (*PILLOW_ERRORS, Image.DecompressionBombError) as error:
        raise MediaError(f"not a readable image: {error}") from None
    check_pixels(height, width, max_pixels=MAX_PIXELS)
    return height, width


def check_pixels(height: int, width: int, *, max_pixels: int) -> None:
    """Checks the size that a picture's header claims.

    Raises:
        MediaError: too_many_pixels or no_pixels.
    """
    claim = f"image of {width} x {height} pixels; at most {max_pixels} are decoded"
    if height * width > max_pixels:
        raise MediaError(claim, reason="too_many_pixels")
    if min(height, width) < 1:
        raise MediaError(claim, reason="no_pixels")


def _decode_jpeg(content: bytes) -> np.ndarray:
    try:
        height, width, color_space, _ = simplejpeg.decode_jpeg_header(content)
        check_pixels(height, width, max_pixels=MAX_PIXELS)
        if color_space in ("CMYK", "YCCK"):  # simplejpeg converts them naively
            return _decode_with_pillow(content)
        return simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True)
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
    """float32 [samples] of an encoded clip: channels averaged, resampled to `sample_rate_hz`.

    Args:
        content: the bytes of a file.
        sample_rate_hz: None for the clip's own.
        extension: the format that the bytes must have; None for any.

    Raises:
        FormatMismatchError: of another format than `extension`.
        MediaError: damaged, empty, shorter than its header says, not finite, or too long.
    """
    waveform, rate = read_waveform(content, extension=extension)
    mono = waveform.mean(axis=1)
    if sample_rate_hz is not None:
        mono = resample(mono, rate, sample_rate_hz)
    return np.ascontiguousarray(mono, dtype=np.float32)


class _SoundBytes(io.BytesIO):
    """libsndfile seeks before the start of damaged files: an error there is printed, not raised."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self.getbuffer().nbytes}
        return super().seek(max(0, start[whence] + offset))


def read_waveform(
    content: bytes,
    *,
    extension: str | None = None,
    max_seconds: float = MAX_AUDIO_SECONDS,
    max_channels: int | None = None,
) -> tuple[np.ndarray, int]:
    """(float32 [samples, channels], sample rate in Hz) of an encoded clip.

    Args:
        content: the bytes of a file.
        extension: the format that the bytes must have; None for any.
        max_seconds: longest clip that is decoded.
        max_channels: most channels that are decoded; None for any number.

    Raises:
        FormatMismatchError: of another format than `extension`.
        MediaError: damaged, empty, shorter than its header says, not finite, or too large.
    """
    import soundfile

    check_is_whole(content)
    try:
        with soundfile.SoundFile(_SoundBytes(content)) as file:
            if extension is not None and file.format not in SOUNDFILE_FORMATS[extension]:
                raise FormatMismatchError(f"expected {extension} bytes, found {file.format}")
            num_frames, rate = file.frames, file.samplerate
            _check_channels(file.channels, max_channels)
            _check_length(num_frames, rate, channels=file.channels, max_seconds=max_seconds)
            # The number, because GSM in WAV cannot seek to find it.
            waveform = file.read(num_frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(f"not readable audio: {error}") from None
    if len(waveform) != num_frames:
        raise MediaError(
            f"audio ends after {len(waveform)} of {num_frames} frames", reason="truncated"
        )
    check_is_finite(waveform)
    return waveform, rate


def _check_channels(channels: int, max_channels: int | None) -> None:
    if max_channels is not None and channels > max_channels:
        raise MediaError(
            f"audio of {channels} channels; at most {max_channels} are taken",
            reason="too_many_channels",
        )


def _check_length(num_frames: int, rate: int, *, channels: int, max_seconds: float) -> None:
    claim = f"audio of {num_frames} frames at {rate} Hz"
    if not MIN_SAMPLE_RATE_HZ <= rate <= MAX_SAMPLE_RATE_HZ:
        raise MediaError(
            f"{claim}; expected {MIN_SAMPLE_RATE_HZ} to {MAX_SAMPLE_RATE_HZ} Hz",
            reason="bad_sample_rate",
        )
    if num_frames < 1:
        raise MediaError(f"{claim}; expected at least one", reason="no_samples")
    if num_frames > max_seconds * rate or num_frames * channels > MAX_AUDIO_VALUES:
        raise MediaError(
            f"{claim} and {channels} channels; at most {max_seconds:.0f} s and "
            f"{MAX_AUDIO_VALUES} values are decoded",
            reason="too_long",
        )


def check_is_finite(waveform: np.ndarray) -> None:
    """Checks that float32 [...] holds no NaN and no infinity.

    Raises:
        MediaError: not_finite.
    """
    if not np.isfinite(waveform).all():
        raise MediaError("audio holds values that are not finite", reason="not_finite")


def resample(waveform: np.ndarray, rate: int, sample_rate_hz: int) -> np.ndarray:
    """float32 [samples] or [samples, channels] at another rate; the same where rates are equal.

    Raises:
        MediaError: too short for a single sample, or too long at the new rate.
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


def audio_seconds(content: bytes) -> tuple[float, int]:
    """(length in seconds, sample rate in Hz), from the header alone.

    Raises:
        MediaError: the header is not an audio file's.
    """
    import soundfile

    try:
        with soundfile.SoundFile(_SoundBytes(content)) as file:
            return file.frames / file.samplerate, file.samplerate
    except (soundfile.SoundFileError, RuntimeError, ZeroDivisionError) as error:
        raise MediaError(f"not readable audio: {error}") from None
