"""Preparation of an audio file: check, decode once, and keep unchanged, re-encode or cut into
clips.

    waveform -> average channels -> trim silent ends -> resample -> cut into clips -> 16-bit FLAC

Loudness changes in only two cases: if `peak_dbfs` is set, or if values exceed full scale (because
of averaging, resampling or float sources). In the second case, one factor scales the whole
recording to full scale, so that nothing is clipped and its clips keep their relative loudness.
16-bit samples that are only cut are stored unchanged.
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

FULL_SCALE = 32_768  # magnitude of full scale in 16-bit samples
MAX_PEAK_DIFFERENCE_DB = 0.01
# A last clip shorter than this fraction of clip_seconds is dropped, because the caption of the
# whole recording would rarely describe it.
MIN_LAST_FRACTION = 0.5


def prepare_audio(content: bytes, options: AudioOptions) -> list[PreparedMedia]:
    """Returns the clips to store for a recording, in order; a recording that is not cut is one
    clip.

    Raises:
        MediaError: if the file is damaged, has an unknown format or values that are not finite, or
            exceeds a limit.
    """
    source_format = check_kind(content, "audio")
    check_stored(source_format, "audio", options.reencode)
    source, source_rate = read_waveform(
        content,
        extension=source_format,
        max_seconds=_max_seconds(options),
        max_channels=options.max_channels,
    )
    waveform, rate, start_seconds = _converted(source, source_rate, options)
    ranges = _clip_ranges(len(waveform), rate, options)
    gain = _gain(_peak(waveform), options)
    is_as_asked = (
        source_format in STORED_FORMATS["audio"]
        and waveform is source
        and ranges == [(0, len(source))]
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
        for start, end in ranges
    ]


def _max_seconds(options: AudioOptions) -> float:
    if options.clip_seconds is not None and options.long_clips == "reject":
        return min(options.max_seconds, options.clip_seconds)
    return options.max_seconds


def _converted(
    waveform: np.ndarray, rate: int, options: AudioOptions
) -> tuple[np.ndarray, int, float]:
    """Averages channels, trims and resamples a waveform as configured.

    Returns:
        float32 [samples, channels] (the same array if nothing changed), its rate in Hz, and the
        seconds trimmed from its start.
    """
    if options.mono and waveform.shape[1] > 1:
        waveform = waveform.mean(axis=1, keepdims=True)
    start, end = _loud_part(waveform, options.trim_silence_dbfs)
    if end - start < len(waveform):
        waveform = waveform[start:end]
    new_rate = options.sample_rate_hz or rate
    if new_rate != rate:
        waveform = resample(waveform, rate, new_rate)
    check_is_finite(waveform)  # sums of huge floats may overflow
    return waveform, new_rate, start / rate


def _loud_part(waveform: np.ndarray, threshold_dbfs: float | None) -> tuple[int, int]:
    """Returns (first, last + 1) sample above the threshold; all samples if none is above it."""
    if threshold_dbfs is None:
        return 0, len(waveform)
    is_loud = (np.abs(waveform) > _from_dbfs(threshold_dbfs)).any(axis=1)
    if not is_loud.any():
        return 0, len(waveform)
    return int(is_loud.argmax()), len(is_loud) - int(is_loud[::-1].argmax())


def _clip_ranges(num_samples: int, rate: int, options: AudioOptions) -> list[tuple[int, int]]:
    """Returns (first, last + 1) sample of each clip to store.

    A last clip shorter than min_seconds, or MIN_LAST_FRACTION of clip_seconds, is dropped.
    """
    longest = MAX_AUDIO_SECONDS if options.clip_seconds is None else options.clip_seconds
    if num_samples <= longest * rate:
        return [(0, num_samples)]
    if options.clip_seconds is None:  # training does not decode longer clips
        raise MediaError(
            f"clip of {num_samples / rate:.0f} s; expected at most {MAX_AUDIO_SECONDS:.0f} s, "
            "or audio.clip_seconds to cut it",
            reason="too_long",
        )
    length = max(1, round(longest * rate))
    if options.long_clips != "cut":
        return [(0, length)]
    shortest = max(MIN_LAST_FRACTION * length, options.min_seconds * rate)
    starts = range(0, num_samples, length)
    ranges = [(start, min(start + length, num_samples)) for start in starts]
    return ranges[:1] + [part for part in ranges[1:] if part[1] - part[0] >= shortest]


def _gain(peak: float, options: AudioOptions) -> float:
    """Returns the factor that scales a recording before it is re-encoded."""
    if options.peak_dbfs is None or peak == 0:
        return 1 / max(1.0, peak)
    gain = _from_dbfs(options.peak_dbfs) / peak
    return 1.0 if abs(20 * math.log10(gain)) <= MAX_PEAK_DIFFERENCE_DB else gain


def _peak(waveform: np.ndarray) -> float:
    """Returns the largest magnitude of float32 [samples, channels]; full scale is 1."""
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
    """Encodes a clip; filters use the source's loudness, and the fingerprint the stored samples."""
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
    """Averages the channels to float32 [samples], contiguous."""
    return waveform.mean(axis=1) if waveform.shape[1] > 1 else waveform.reshape(-1)


def _encode_flac(samples: np.ndarray, rate: int) -> bytes:
    import soundfile

    sink = io.BytesIO()
    try:
        soundfile.write(sink, samples, rate, format="FLAC", subtype="PCM_16")
    except soundfile.SoundFileError as error:
        raise MediaError(
            f"audio at {rate} Hz cannot be written as FLAC: {error}; set audio.sample_rate_hz",
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
