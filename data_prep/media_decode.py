"""Decodes the bytes of an image or an audio clip, strictly: damaged bytes raise, sizes are bounded.

Decoded images are uint8 [H, Wd, 3], RGB; decoded audio is float32 [samples], mono, in [-1, 1].
"""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

# Refused before decoding: a 0.5 MB PNG can claim any size.
MAX_PIXELS = 50_000_000
MAX_AUDIO_SECONDS = 3600.0
# The only decoders of Pillow that bytes from elsewhere may reach.
PILLOW_FORMATS = ("JPEG", "PNG", "WEBP")
SOUNDFILE_FORMATS = {
    "wav": ("WAV", "WAVEX", "RF64"),
    "flac": ("FLAC",),
    "mp3": ("MP3", "MPEG"),
    "ogg": ("OGG",),
    "opus": ("OGG",),
}
# What Pillow's decoders raise on damaged bytes.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error)
REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
UNKNOWN_LENGTH = 0xFFFFFFFF  # what programs that write WAV into a pipe put as its length


class MediaError(ValueError):
    """The bytes are not what their extension says, are damaged, or claim too large a size."""


class FormatMismatchError(MediaError):
    """The bytes are of another format than their extension says."""


def decode_image(content: bytes, extension: str) -> np.ndarray:
    """uint8 [H, Wd, 3] of an encoded image; transparency is laid on white.

    Raises:
        FormatMismatchError: of another format than `extension`.
        MediaError: damaged, or above MAX_PIXELS.
    """
    found, expected = _image_format(content), "jpg" if extension == "jpeg" else extension
    if found is not None and found != expected:
        raise FormatMismatchError(f"expected {expected} bytes, found {found}")
    if extension in ("jpg", "jpeg"):
        return _decode_jpeg(content)
    return _decode_with_pillow(content)


def _image_format(content: bytes) -> str | None:
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    return None


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
    import soundfile
    import soxr

    _check_wav_is_whole(content)
    _check_ogg_is_whole(content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            num_frames, rate = file.frames, file.samplerate
            if extension is not None and file.format not in SOUNDFILE_FORMATS[extension]:
                raise FormatMismatchError(f"expected {extension} bytes, found {file.format}")
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
    if sample_rate_hz is not None and rate != sample_rate_hz:
        mono = soxr.resample(mono, rate, sample_rate_hz, quality="HQ")
        if not len(mono):
            raise MediaError(f"audio of {num_frames} frames at {rate} Hz is too short to resample")
    return np.ascontiguousarray(mono, dtype=np.float32)


def _check_wav_is_whole(content: bytes) -> None:
    """A truncated WAV is read by libsndfile as far as it goes, without an error."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        return
    place = 12
    while place + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, place)
        if name == b"data" and place + 8 + size > len(content) and size != UNKNOWN_LENGTH:
            raise MediaError(
                f"WAV cut short: expected {size} bytes of sound, found {len(content) - place - 8}"
            )
        place += 8 + size + size % 2


def _check_ogg_is_whole(content: bytes) -> None:
    """An Ogg file that lost pages or its end is decoded by libsndfile to a shorter clip."""
    if content[:4] != b"OggS":
        return
    place, next_page, is_ended = 0, {}, {}
    while place < len(content):
        header = content[place : place + 27]
        if len(header) < 27 or header[:4] != b"OggS":
            raise MediaError(f"Ogg: expected a page at byte {place} of {len(content)}")
        sizes = content[place + 27 : place + 27 + header[26]]
        page_end = place + 27 + header[26] + sum(sizes)
        if _ogg_crc32(content[place:page_end]) != int.from_bytes(header[22:26], "little"):
            raise MediaError(f"Ogg: the page at byte {place} is damaged or cut short")
        flags, stream, page = struct.unpack_from("<5xB8xII", header)
        if page != next_page.get(stream, page):
            raise MediaError(f"Ogg: expected page {next_page[stream]}, found {page}")
        next_page[stream], is_ended[stream] = page + 1, bool(flags & 4)
        place = page_end
    if not all(is_ended.values()):
        raise MediaError("Ogg cut short: its last page is missing")


def _ogg_crc32(page: bytes) -> int:
    """Ogg's checksum is zlib's polynomial with the bits the other way round and no inversion."""
    blanked = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(blanked.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(REVERSED_BITS), "big")


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
