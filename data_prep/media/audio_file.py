"""Opens the bytes of an audio file and reads frames, strictly: what a header claims is bounded, and
what is missing or not finite raises.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from data_prep.media.audio_container import check_is_whole
from data_prep.media.formats import FormatMismatchError, MediaError

if TYPE_CHECKING:
    import soundfile

MAX_AUDIO_SECONDS = 3600.0
# Of all channels; a clip of 6 MB can claim billions, at rates that no ear needs.
MAX_AUDIO_VALUES = 400_000_000
MIN_SAMPLE_RATE_HZ, MAX_SAMPLE_RATE_HZ = 1000, 655_350  # the second is the most that FLAC holds
SOUNDFILE_FORMATS = {
    "wav": ("WAV", "WAVEX", "RF64"),
    "flac": ("FLAC",),
    "mp3": ("MP3", "MPEG"),
    "ogg": ("OGG",),
    "opus": ("OGG",),
    "aiff": ("AIFF",),
}


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
    """A clip at its first frame, its header checked. Arguments and errors as of read_waveform."""
    import soundfile

    check_is_whole(content)
    try:
        with soundfile.SoundFile(_SoundBytes(content)) as file:
            if extension is not None and file.format not in SOUNDFILE_FORMATS[extension]:
                raise FormatMismatchError(f"expected {extension} bytes, found {file.format}")
            _check_channels(file.channels, max_channels)
            _check_length(
                file.frames, file.samplerate, channels=file.channels, max_seconds=max_seconds
            )
            yield file
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise MediaError(f"not readable audio: {error}") from None


def read_frames(file: soundfile.SoundFile, num_frames: int) -> np.ndarray:
    """float32 [num_frames, channels] from where the clip stands.

    Raises:
        MediaError: it ends before, or holds values that are not finite.
    """
    # The number, because GSM in WAV cannot seek to find it.
    waveform = file.read(num_frames, dtype="float32", always_2d=True)
    if len(waveform) != num_frames:
        raise MediaError(
            f"audio ends after {len(waveform)} of {num_frames} frames", reason="truncated"
        )
    check_is_finite(waveform)
    return waveform


def can_seek(file: soundfile.SoundFile) -> bool:
    """Whether a seek leads to the very frames that reading from the beginning leads to.

    Not in MP3: a frame may need the bytes of many before it, and at low bit rates libsndfile goes
    back by too few of them, and sometimes to a wrong place.
    """
    return file.seekable() and file.format not in SOUNDFILE_FORMATS["mp3"]


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
