"""Strict reader of audio files.

The sizes in a header are limited. Missing frames and values that are not finite raise an error.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from data_prep.media.audio_container import complete_audio
from data_prep.media.formats import FormatMismatchError, MediaError
from data_prep.media.sound_bytes import SoundBytes

if TYPE_CHECKING:
    import soundfile

MAX_AUDIO_SECONDS = 3600.0
# Total over all channels; the header of a 6 MB file can declare billions of values.
MAX_AUDIO_VALUES = 400_000_000
MIN_SAMPLE_RATE_HZ, MAX_SAMPLE_RATE_HZ = 1000, 655_350  # FLAC's maximum
SOUNDFILE_FORMATS = {
    "wav": ("WAV", "WAVEX", "RF64"),
    "flac": ("FLAC",),
    "mp3": ("MP3", "MPEG"),
    "ogg": ("OGG",),
    "opus": ("OGG",),
    "aiff": ("AIFF",),
}


def read_waveform(
    content: bytes,
    *,
    extension: str | None = None,
    max_seconds: float = MAX_AUDIO_SECONDS,
    max_channels: int | None = None,
) -> tuple[np.ndarray, int]:
    """Decodes a clip to its waveform.

    Args:
        content: bytes of a file.
        extension: required format; None for any.
        max_seconds: maximum length of a clip.
        max_channels: maximum number of channels; None for any number.

    Returns:
        float32 [samples, channels], and the sample rate in Hz.

    Raises:
        FormatMismatchError: if the format is not `extension`.
        MediaError: if the clip is damaged, empty, shorter than declared in its header, not finite,
            or too large.
    """
    with open_audio(
        content, extension=extension, max_seconds=max_seconds, max_channels=max_channels
    ) as file:
        return read_frames(file, file.frames), file.samplerate


@contextmanager
def open_audio(
    content: bytes,
    *,
    extension: str | None = None,
    max_seconds: float = MAX_AUDIO_SECONDS,
    max_channels: int | None = None,
) -> Iterator[soundfile.SoundFile]:
    """Opens a clip and checks its header; takes the arguments of `read_waveform`."""
    import soundfile

    content = complete_audio(content)
    try:
        with soundfile.SoundFile(SoundBytes(content)) as file:
            if extension is not None and file.format not in SOUNDFILE_FORMATS[extension]:
                raise FormatMismatchError(f"expected {extension} bytes, found {file.format}")
            _check_channels(file.channels, max_channels)
            _check_length(
                file.frames, file.samplerate, channels=file.channels, max_seconds=max_seconds
            )
            yield file
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(f"unreadable audio: {_description(error)}") from None


def _description(error: Exception) -> str:
    """Describes an error of libsndfile, without the address of the object that it was reading."""
    return getattr(error, "error_string", str(error))


def read_frames(file: soundfile.SoundFile, num_frames: int) -> np.ndarray:
    """Reads frames from the current position of a clip.

    Returns:
        float32 [num_frames, channels].

    Raises:
        MediaError: if the clip ends early, or has values that are not finite.
    """
    # The number is explicit, because libsndfile would seek to find it, which fails for GSM.
    waveform = file.read(num_frames, dtype="float32", always_2d=True)
    if len(waveform) != num_frames:
        raise MediaError(
            f"audio ends after {len(waveform)} of {num_frames} frames", reason="truncated"
        )
    check_is_finite(waveform)
    return waveform


def can_seek(file: soundfile.SoundFile) -> bool:
    """Returns True if reading after a seek yields the same frames as reading from the start.

    False for MP3: a frame may need the bytes of many earlier frames. At low bit rates, libsndfile
    goes back too few frames, and sometimes to a wrong position.
    """
    return file.seekable() and file.format not in SOUNDFILE_FORMATS["mp3"]


def _check_channels(channels: int, max_channels: int | None) -> None:
    if max_channels is not None and channels > max_channels:
        raise MediaError(
            f"audio with {channels} channels; expected at most {max_channels}",
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
        raise MediaError(f"{claim}; expected at least one frame", reason="no_samples")
    if num_frames > max_seconds * rate or num_frames * channels > MAX_AUDIO_VALUES:
        raise MediaError(
            f"{claim} with {channels} channels; expected at most {max_seconds:.0f} s and "
            f"{MAX_AUDIO_VALUES} values",
            reason="too_long",
        )


def check_is_finite(waveform: np.ndarray) -> None:
    """Checks that a float32 array has neither NaN nor infinity.

    Raises:
        MediaError: if it has; the reason is not_finite.
    """
    if not np.isfinite(waveform).all():
        raise MediaError("audio contains NaN or infinity", reason="not_finite")


def audio_seconds(content: bytes) -> tuple[float, int]:
    """Returns the length in seconds and the sample rate in Hz, without decoding.

    Raises:
        MediaError: in the same cases as `read_waveform`, but damage to the sound may be missed.
    """
    with open_audio(content) as file:
        return file.frames / file.samplerate, file.samplerate
