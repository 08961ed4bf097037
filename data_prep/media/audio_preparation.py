"""One audio file: checked within limits, decoded once, and kept as it is, re-encoded or cut.

    waveform -> channels averaged -> silent ends off -> resampled -> clips -> FLAC of 16 bits

Loudness stays as it is, but for two cases: `peak_dbfs` asks for another, or averaging, resampling
or the source's own floats exceed full scale. Then the whole recording is scaled by one factor, so
that its loudest value is at full scale: nothing is clipped, and its clips keep their proportions.
Samples of 16 bits that are only cut are stored bit by bit as they were.
"""

from __future__ import annotations

import io
import math

import numpy as np

from data_prep.config import AudioOptions
from data_prep.media.audio_file import MAX_AUDIO_SECONDS, check_is_finite, read_waveform
from data_prep.media.audio_fingerprint import audio_fingerprint
from data_prep.media.decode import resample
from data_prep.media.formats import (
    STORED_FORMATS,
    MediaError,
    PreparedMedia,
    check_kind,
    check_stored,
)

FULL_SCALE = 32_768  # of 16 bits
MAX_PEAK_DIFFERENCE_DB = 0.01
# A last piece that is shorter than this share of clip_seconds is left out: its caption, which
# is that of the whole recording, would describe it too seldom.
MIN_LAST_PIECE = 0.5


def prepare_audio(content: bytes, options: AudioOptions) -> list[PreparedMedia]:
    """The clips that are stored of a recording, in their order: one, unless it is cut.

    Raises:
        MediaError: damaged, of an unknown format, not finite, or above a limit.
    """
    source_format = check_kind(content, "audio")
    check_stored(source_format, "audio", options.reencode)
    source, source_rate = read_waveform(
        content,
        extension=source_format,
        max_seconds=_max_seconds(options),
        max_channels=options.max_channels,
    )
    waveform, rate, start_seconds = _as_asked(source, source_rate, options)
    pieces = _pieces(len(waveform), rate, options)
    gain = _gain(_peak(waveform), options)
    is_as_asked = (
        source_format in STORED_FORMATS["audio"]
        and waveform is source
        and pieces == [(0, len(source))]
        and (gain == 1 or options.peak_dbfs is None)
    )
    if options.reencode == "never" or (options.reencode == "if_needed" and is_as_asked):
        return [_kept(content, source_format, source, source_rate, options)]
    return [
        _reencoded(
            waveform[start:end],
            rate,
            options,
            gain=gain,
            start_seconds=start_seconds + start / rate,
            source_seconds=len(source) / source_rate,
        )
        for start, end in pieces
    ]


def _max_seconds(options: AudioOptions) -> float:
    if options.clip_seconds is not None and options.long_clips == "reject":
        return min(options.max_seconds, options.clip_seconds)
    return options.max_seconds


def _as_asked(
    waveform: np.ndarray, rate: int, options: AudioOptions
) -> tuple[np.ndarray, int, float]:
    """(float32 [samples, channels], its rate in Hz, seconds that were cut off its start)

    The waveform is the very same array where nothing had to be done.
    """
    if options.mono and waveform.shape[1] > 1:
        waveform = waveform.mean(axis=1, keepdims=True)
    start, end = _loud_part(waveform, options.trim_silence_dbfs)
    if end - start < len(waveform):
        waveform = waveform[start:end]
    new_rate = options.sample_rate_hz or rate
    if new_rate != rate:
        waveform = resample(waveform, rate, new_rate)
    check_is_finite(waveform)  # sums of huge floats are not
    return waveform, new_rate, start / rate


def _loud_part(waveform: np.ndarray, threshold_dbfs: float | None) -> tuple[int, int]:
    """(first, one past the last) sample above the threshold; all where none is."""
    if threshold_dbfs is None:
        return 0, len(waveform)
    is_loud = (np.abs(waveform) > _from_dbfs(threshold_dbfs)).any(axis=1)
    if not is_loud.any():
        return 0, len(waveform)
    return int(is_loud.argmax()), len(is_loud) - int(is_loud[::-1].argmax())


def _pieces(num_samples: int, rate: int, options: AudioOptions) -> list[tuple[int, int]]:
    """(first, one past the last) sample of each clip that is stored.

    A last piece shorter than min_seconds, or than MIN_LAST_PIECE of clip_seconds, is left out.
    """
    longest = MAX_AUDIO_SECONDS if options.clip_seconds is None else options.clip_seconds
    if num_samples <= longest * rate:
        return [(0, num_samples)]
    if options.clip_seconds is None:  # no more is decoded by training
        raise MediaError(
            f"clip of {num_samples / rate:.0f} s; at most {MAX_AUDIO_SECONDS:.0f} s are stored, "
            "unless audio.clip_seconds cuts it",
            reason="too_long",
        )
    length = max(1, round(longest * rate))
    if options.long_clips != "cut":
        return [(0, length)]
    shortest = max(MIN_LAST_PIECE * length, options.min_seconds * rate)
    starts = range(0, num_samples, length)
    pieces = [(start, min(start + length, num_samples)) for start in starts]
    return pieces[:1] + [piece for piece in pieces[1:] if piece[1] - piece[0] >= shortest]


def _gain(peak: float, options: AudioOptions) -> float:
    """What a recording is multiplied with before it is re-encoded."""
    if options.peak_dbfs is None or peak == 0:
        return 1 / max(1.0, peak)
    gain = _from_dbfs(options.peak_dbfs) / peak
    return 1.0 if abs(20 * math.log10(gain)) <= MAX_PEAK_DIFFERENCE_DB else gain


def _peak(waveform: np.ndarray) -> float:
    """The largest magnitude of float32 [samples, channels]; full scale is 1."""
    return max(float(waveform.max()), -float(waveform.min()))


def _from_dbfs(dbfs: float) -> float:
    return 10 ** (dbfs / 20)


def _kept(
    content: bytes, extension: str, waveform: np.ndarray, rate: int, options: AudioOptions
) -> PreparedMedia:
    seconds = len(waveform) / rate
    measures = {
        "seconds": seconds,
        "sample_rate_hz": rate,
        "channels": waveform.shape[1],
        "start_seconds": 0.0,
        "source_seconds": seconds,
        "is_reencoded": False,
        **audio_fingerprint(_mono(waveform), rate),
    }
    return PreparedMedia(content, extension, measures, _filters(waveform, seconds, options))


def _reencoded(
    waveform: np.ndarray,
    rate: int,
    options: AudioOptions,
    *,
    gain: float,
    start_seconds: float,
    source_seconds: float,
) -> PreparedMedia:
    """The filters see the loudness of the source; the fingerprint, what is stored."""
    seconds = len(waveform) / rate
    scaled = np.rint(waveform * np.float32(gain * FULL_SCALE))
    samples = np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype(np.int16)
    measures = {
        "seconds": seconds,
        "sample_rate_hz": rate,
        "channels": waveform.shape[1],
        "start_seconds": start_seconds,
        "source_seconds": source_seconds,
        "is_reencoded": True,
        **audio_fingerprint(_mono(samples.astype(np.float32) / FULL_SCALE), rate),
    }
    content = _encode_flac(samples, rate)
    return PreparedMedia(content, "flac", measures, _filters(waveform, seconds, options))


def _mono(waveform: np.ndarray) -> np.ndarray:
    """float32 [samples], contiguous."""
    return waveform.mean(axis=1) if waveform.shape[1] > 1 else waveform.reshape(-1)


def _encode_flac(samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    sink = io.BytesIO()
    try:
        soundfile.write(sink, samples, rate, format="FLAC", subtype="PCM_16")
    except soundfile.SoundFileError as error:
        raise MediaError(
            f"audio of {rate} Hz cannot be written as FLAC: {error}; set audio.sample_rate_hz",
            reason="bad_sample_rate",
        ) from None
    return sink.getvalue()


def _filters(waveform: np.ndarray, seconds: float, options: AudioOptions) -> tuple[str, ...]:
    found = []
    if options.min_peak_dbfs is not None and _peak(waveform) < _from_dbfs(options.min_peak_dbfs):
        found.append("audio_silent")
    if seconds < options.min_seconds:
        found.append("audio_too_short")
    return tuple(found)
