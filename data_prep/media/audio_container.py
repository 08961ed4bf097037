"""Completeness checks of audio files, based on the structure of their containers.

They are necessary because libsndfile reads a truncated file without an error.
"""

from __future__ import annotations

import struct
import zlib

from data_prep.media.formats import MediaError, audio_format, id3_bytes, is_mp3_frame

REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
UNKNOWN_LENGTH = 0xFFFFFFFF  # size of the data chunk in a WAV file that was written to a pipe
# Bit rates of MPEG layer III in kbit/s, indexed by the upper four bits of a header's third byte.
MP3_BIT_RATES = {
    "version 1": (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    "version 2": (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
MP3_SAMPLE_RATES = (44_100, 48_000, 32_000)  # Hz of version 1


def check_is_complete(content: bytes) -> None:
    """Checks that a WAV, AIFF, Ogg or MP3 file is complete.

    FLAC needs no such check, because its decoder detects missing parts.

    Raises:
        MediaError: if it is not. The reason is truncated, bad_sample_rate, chained (an Ogg file of
            several recordings in a row), or undecodable (an Ogg file with a damaged page).
    """
    check = CHECKS.get(audio_format(content))
    if check is not None:
        check(content)


def _check_wav(content: bytes) -> None:
    """Checks a RIFF or RF64 file; RF64 stores its 64-bit sizes in a separate chunk."""
    long_size = None
    for name, size, start in _chunks(content, byte_order="<"):
        if name == b"ds64" and size >= 16:
            long_size = int.from_bytes(content[start + 8 : start + 16], "little")
        if name == b"fmt " and content[start + 4 : start + 8] == bytes(4):
            raise MediaError("WAV of 0 Hz", reason="bad_sample_rate")
        if name == b"data":
            if size == UNKNOWN_LENGTH:
                size = long_size
            _check_sound_bytes(content, start, size, container="WAV")
            return  # chunks after the audio data do not matter


def _check_aiff(content: bytes) -> None:
    for name, size, start in _chunks(content, byte_order=">"):
        if name == b"SSND":
            _check_sound_bytes(content, start, size, container="AIFF")


def _chunks(content: bytes, *, byte_order: str):
    """Yields (name, size, first byte) of every chunk of a RIFF or AIFF file."""
    place = 12
    while place + 8 <= len(content):
        name, size = struct.unpack_from(byte_order + "4sI", content, place)
        yield name, size, place + 8
        place += 8 + size + size % 2


def _check_sound_bytes(content: bytes, start: int, size: int | None, *, container: str) -> None:
    if size is not None and start + size > len(content):
        raise MediaError(
            f"{container} truncated: expected {size} bytes of audio, found {len(content) - start}",
            reason="truncated",
        )


def _check_mp3(content: bytes) -> None:
    """Walks from frame to frame; tags and padding after the last frame do not matter."""
    place = id3_bytes(content)
    while is_mp3_frame(content[place : place + 4]):
        size = _mp3_frame_bytes(content[place : place + 4])
        if place + size > len(content):
            raise MediaError(
                f"MP3 truncated: expected a frame of {size} bytes at byte {place}, "
                f"found {len(content) - place}",
                reason="truncated",
            )
        place += size


def _mp3_frame_bytes(header: bytes) -> int:
    """Computes 144 * bit rate / sample rate, plus one byte if padded (ISO 11172-3, 2.4.3.1)."""
    version = header[1] >> 3 & 3  # 3: MPEG 1; 2: MPEG 2; 0: MPEG 2.5
    rates = MP3_BIT_RATES["version 1" if version == 3 else "version 2"]
    bits_per_second = 1000 * rates[header[2] >> 4]
    sample_rate_hz = MP3_SAMPLE_RATES[header[2] >> 2 & 3] // {3: 1, 2: 2, 0: 4}[version]
    bytes_by_rate = 144 if version == 3 else 72
    return bytes_by_rate * bits_per_second // sample_rate_hz + (header[2] >> 1 & 1)


def _check_ogg(content: bytes) -> None:
    """Checks every page, because libsndfile silently skips missing pages of an Ogg file."""
    place, next_page, is_ended = id3_bytes(content), {}, {}
    is_beginning = True  # the first pages of all streams come before any other (RFC 3533, 4)
    while place < len(content):
        header = content[place : place + 27]
        if len(header) < 27 or header[:4] != b"OggS":
            raise MediaError(f"Ogg: expected a page at byte {place} of {len(content)}")
        sizes = content[place + 27 : place + 27 + header[26]]
        page_end = place + 27 + header[26] + sum(sizes)
        if page_end > len(content):
            raise MediaError(f"Ogg truncated in the page at byte {place}", reason="truncated")
        if _ogg_crc32(content[place:page_end]) != int.from_bytes(header[22:26], "little"):
            raise MediaError(f"Ogg: the page at byte {place} is damaged")
        flags, stream, page = struct.unpack_from("<5xB8xII", header)
        if flags & 2 and not is_beginning:  # libsndfile reads only the first recording
            raise MediaError(
                f"Ogg of several recordings in a row: at byte {place}", reason="chained"
            )
        if page != next_page.get(stream, page):
            raise MediaError(f"Ogg: expected page {next_page[stream]}, found {page}")
        is_beginning = bool(flags & 2)
        next_page[stream], is_ended[stream] = page + 1, bool(flags & 4)
        place = page_end
    if not all(is_ended.values()):
        raise MediaError("Ogg truncated: its last page is missing", reason="truncated")


def _ogg_crc32(page: bytes) -> int:
    """Computes Ogg's checksum: zlib's polynomial with reversed bits and without inversion."""
    blanked = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(blanked.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(REVERSED_BITS), "big")


CHECKS = {"wav": _check_wav, "aiff": _check_aiff, "mp3": _check_mp3, "ogg": _check_ogg}
CHECKS["opus"] = _check_ogg
