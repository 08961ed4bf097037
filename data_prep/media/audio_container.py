"""Completeness checks of audio files, based on the structure of their containers.

They are necessary because libsndfile reads a truncated file without an error, and reads no further
than a header says. Lengths that a header states wrongly, or not at all, are corrected.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator

from data_prep.media.flac_frames import complete_flac
from data_prep.media.formats import MediaError, audio_format, id3_bytes
from data_prep.media.mp3_frames import complete_mp3

REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
# Sizes from here on stand in WAV and AIFF files that were written to a pipe: sox writes 0x7FFFF000
# or 0x7F000008, others 0x7FFFFFFF, 0x80000000 or 0xFFFFFFFF.
UNKNOWN_LENGTH = 0x7F000000
UNKNOWN_LONG_LENGTH = 1 << 62  # the same for 64 bits
RF64_SIZE = 0xFFFFFFFF  # the size is in the ds64 chunk


def complete_audio(content: bytes) -> bytes:
    """Checks that an audio file is complete, and corrects the length in its header.

    Returns:
        The bytes of the file, unchanged if libsndfile reads it to its end; otherwise with a header
        that states what the file contains.

    Raises:
        MediaError: if it is not. The reason is truncated, bad_sample_rate, chained (an Ogg file of
            several recordings in a row), or undecodable (an Ogg file with a damaged page).
    """
    check = CHECKS.get(audio_format(content))
    return content if check is None else check(content)


def _complete_wav(content: bytes) -> bytes:
    """Checks a RIFF or RF64 file; RF64 stores its 64-bit sizes in a separate chunk.

    A recorder that lost power leaves a size of 0, followed by the sound.
    """
    long_size = size_at = None
    for name, size, start in _chunks(content, byte_order="<"):
        if name == b"ds64" and size >= 16:
            long_size = int.from_bytes(content[start + 8 : start + 16], "little")
            size_at = start + 8
        if name == b"fmt " and content[start + 4 : start + 8] == bytes(4):
            raise MediaError("WAV of 0 Hz", reason="bad_sample_rate")
        if name == b"data":
            if size == RF64_SIZE and long_size is not None:
                size, width = long_size, 8
            else:
                size_at, width = start - 4, 4
            least_unknown = UNKNOWN_LENGTH if width == 4 else UNKNOWN_LONG_LENGTH
            if size >= least_unknown or (size == 0 and not _are_chunks(content, start)):
                found = (len(content) - start).to_bytes(width, "little")
                return content[:size_at] + found + content[size_at + width :]
            _check_sound_bytes(content, start, size, container="WAV")
            return content  # chunks after the audio data do not matter
    return content


def _are_chunks(content: bytes, place: int) -> bool:
    """Returns whether the rest of a file is empty or consists of chunks, and thus not of sound."""
    for name, size, start in _chunks(content, byte_order="<", place=place):
        if not (name.isascii() and name.decode("latin-1").isprintable()):
            return False
        place = start + size
    return place in (len(content), len(content) - 1)


def _complete_aiff(content: bytes) -> bytes:
    for name, size, start in _chunks(content, byte_order=">"):
        if name == b"SSND" and size < UNKNOWN_LENGTH:
            _check_sound_bytes(content, start, size, container="AIFF")
    return content


def _chunks(
    content: bytes, *, byte_order: str, place: int = 12
) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, size, first byte) of every chunk of a RIFF or AIFF file."""
    while place + 8 <= len(content):
        name, size = struct.unpack_from(byte_order + "4sI", content, place)
        yield name, size, place + 8
        place += 8 + size + size % 2


def _check_sound_bytes(content: bytes, start: int, size: int, *, container: str) -> None:
    if start + size > len(content):
        raise MediaError(
            f"{container} truncated: expected {size} bytes of audio, found {len(content) - start}",
            reason="truncated",
        )


def _complete_ogg(content: bytes) -> bytes:
    """Checks every page, because libsndfile silently skips missing pages of an Ogg file."""
    place, next_page, is_ended, positions = id3_bytes(content), {}, {}, {}
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
        flags, position, stream, page = struct.unpack_from("<5xBqII", header)
        if flags & 2 and not is_beginning:  # libsndfile reads only the first recording
            raise MediaError(
                f"Ogg of several recordings in a row: at byte {place}", reason="chained"
            )
        if page != next_page.get(stream, page):
            raise MediaError(f"Ogg: expected page {next_page[stream]}, found {page}")
        # The last position is the length (RFC 3533, 6).
        reached = positions.get(stream, 0)
        is_inside_packet = position == -1 and not (flags & 4 and min(sizes, default=255) < 255)
        if position < reached and not is_inside_packet:
            raise MediaError(
                f"Ogg: the page at byte {place} ends at sample {position}; expected at least "
                f"{reached}"
            )
        positions[stream] = max(position, reached)
        is_beginning = bool(flags & 2)
        next_page[stream], is_ended[stream] = page + 1, bool(flags & 4)
        place = page_end
    if not all(is_ended.values()):
        raise MediaError("Ogg truncated: its last page is missing", reason="truncated")
    return content


def _ogg_crc32(page: bytes) -> int:
    """Computes Ogg's checksum: zlib's polynomial with reversed bits and without inversion."""
    blanked = page[:22] + bytes(4) + page[26:]
    crc = zlib.crc32(blanked.translate(REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int.from_bytes(crc.to_bytes(4, "little").translate(REVERSED_BITS), "big")


CHECKS: dict[str | None, Callable[[bytes], bytes]] = {
    "wav": _complete_wav,
    "aiff": _complete_aiff,
    "flac": complete_flac,
    "mp3": complete_mp3,
    "ogg": _complete_ogg,
    "opus": _complete_ogg,
}
