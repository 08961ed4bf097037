"""Completeness and length of MP3 files, counted frame by frame.

The length of an MP3 file is in a Xing or VBRI tag, stored as a first frame without sound. If there
is none, libsndfile computes a length from the bit rate of the first frame. It reads no further than
that length, so the end of a file with a variable bit rate would be missing. Bytes that are no frame
(ID3, APE and Lyrics3 tags, padding) are left out wherever they are, so that they change nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from itertools import accumulate

from data_prep.media.formats import MediaError, id3_bytes, is_mp3_frame
from data_prep.media.sound_bytes import SoundBytes

# Bit rates of MPEG layer III in kbit/s, indexed by the upper four bits of a header's third byte.
BIT_RATES = {
    "version 1": (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    "version 2": (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
SAMPLE_RATES = (44_100, 48_000, 32_000)  # Hz of version 1
XING_TAGS = (b"Xing", b"Info")
VBRI_START = 36  # bytes from the frame to the tag
XING_COUNT, VBRI_COUNT = 8, 14  # bytes from the tag to the number of frames
HAS_COUNT = 1  # flag of a Xing tag: it holds the number of frames
# Headers in a row that mark the first frame after bytes that are neither a frame nor a known tag.
FRAMES_TO_RESUME = 3
ID3V1_BYTES = {False: 128, True: 227}  # whether it is extended: bytes
APE_MARK, APE_HEADER_BYTES = b"APETAGEX", 32
IS_APE_HEADER = 1 << 29  # flag: the tag follows this header; otherwise this is its footer
LYRICS_MARK, LYRICS_END = b"LYRICSBEGIN", re.compile(rb"LYRICS200|LYRICSEND")
MAX_LYRICS_BYTES = MAX_HEADLESS_BYTES = 1 << 16
RESUMING_MARK = re.compile(rb"\xff|ID3[\2-\4]|APETAGEX")  # possible beginnings after other bytes


def complete_mp3(content: bytes) -> bytes:
    """Checks that the last frame of a file is complete, and corrects the length in its tag.

    Returns:
        The frames of the file, from which libsndfile reads all of them. The number of frames is in
        a tag if it would be wrong otherwise.

    Raises:
        MediaError: if a frame is truncated; the reason is truncated.
    """
    frames = list(_frames(content))
    if not frames:
        return content
    content, frames = _without_gaps(content, frames)
    first, tag = frames[0], _tag_start(content, frames[0])
    if tag is None:
        length = len(frames) * _samples_per_frame(content, first)
        is_known = _estimated_samples(content) == length
        return content if is_known else _with_tag(content, frames, start=first)
    num_frames = len(frames) - 1
    if content[tag : tag + 4] == b"VBRI":  # libsndfile ignores it
        (stated,) = struct.unpack_from(">I", content, tag + VBRI_COUNT)
        if stated > num_frames + 1:  # some programs count the frame of the tag
            raise MediaError(
                f"MP3 truncated: expected {stated} frames, found {num_frames}", reason="truncated"
            )
    elif content[tag + 7] & HAS_COUNT:
        (stated,) = struct.unpack_from(">I", content, tag + XING_COUNT)
        # A larger number is that of a truncated file, which the decoder finds to end early.
        if stated >= num_frames:
            return content
        count_end = tag + XING_COUNT + 4
        return content[: tag + XING_COUNT] + struct.pack(">I", num_frames) + content[count_end:]
    return _with_tag(content, frames[1:], start=first) if num_frames else content


def _without_gaps(content: bytes, frames: list[int]) -> tuple[bytes, list[int]]:
    """Returns (the bytes of the frames alone, first byte of every frame)."""
    sizes = [_frame_bytes(content[place : place + 4]) for place in frames]
    if sum(sizes) == len(content):
        return content, frames
    whole = b"".join(
        content[place : place + size] for place, size in zip(frames, sizes, strict=True)
    )
    return whole, list(accumulate(sizes[:-1], initial=0))


def _with_tag(content: bytes, frames: list[int], *, start: int) -> bytes:
    """Replaces the bytes from `start` to the first frame by a tag with the number of frames."""
    header = content[frames[0] : frames[0] + 4]
    return content[:start] + _tag_frame(header, len(frames)) + content[frames[0] :]


def _frames(content: bytes) -> Iterator[int]:
    """Yields the first byte of every frame; tags and padding between frames are skipped."""
    place: int | None = 0
    while place is not None:
        header = content[place : place + 4]
        if not is_mp3_frame(header):
            tag_bytes = _tag_bytes(content, place) or _headless_ape_bytes(content, place)
            place = place + tag_bytes if tag_bytes else _resumed(content, place)
            continue
        size = _frame_bytes(header)
        if place + size > len(content):
            raise MediaError(
                f"MP3 truncated: expected a frame of {size} bytes at byte {place}, "
                f"found {len(content) - place}",
                reason="truncated",
            )
        yield place
        place += size


def _tag_bytes(content: bytes, place: int) -> int:
    """Returns the length of the ID3, APE or Lyrics3 tag that begins at a byte; 0 if none does."""
    head, size = content[place : place + APE_HEADER_BYTES], 0
    if head.startswith(b"ID3"):
        size = id3_bytes(head)
    elif head.startswith(APE_MARK) and len(head) == APE_HEADER_BYTES:
        num_bytes, _, flags = struct.unpack_from("<III", head, 12)
        size = APE_HEADER_BYTES + (num_bytes if flags & IS_APE_HEADER else 0)
    elif head.startswith(LYRICS_MARK):
        found = LYRICS_END.search(content, place, place + MAX_LYRICS_BYTES)
        size = found.end() - place if found else 0
    elif head.startswith(b"TAG"):
        size = ID3V1_BYTES[head.startswith(b"TAG+")]
    return size if place + size <= len(content) else 0  # otherwise, its size is damaged


def _headless_ape_bytes(content: bytes, place: int) -> int:
    """Returns the length of the APE tag without a header that begins at a byte; 0 if none does."""
    footer = content.find(APE_MARK, place, place + MAX_HEADLESS_BYTES)
    if footer < 0 or footer + APE_HEADER_BYTES > len(content):
        return 0
    (num_bytes,) = struct.unpack_from("<I", content, footer + 12)  # of items and footer
    return num_bytes if place + num_bytes == footer + APE_HEADER_BYTES else 0


def _resumed(content: bytes, place: int) -> int | None:
    """Returns the first byte of the frames or tags after a gap; None if there are no more."""
    for mark in RESUMING_MARK.finditer(content, place):
        following, num_frames = mark.start(), 0
        if _tag_bytes(content, following):
            return following
        while num_frames < FRAMES_TO_RESUME and is_mp3_frame(content[following : following + 4]):
            following += _frame_bytes(content[following : following + 4])
            num_frames += 1
        is_enough = num_frames == FRAMES_TO_RESUME or (
            num_frames and (following == len(content) or _tag_bytes(content, following))
        )
        if is_enough and following <= len(content):
            return mark.start()
    return None


def _frame_bytes(header: bytes) -> int:
    """Computes 144 * bit rate / sample rate, plus one byte if padded (ISO 11172-3, 2.4.3.1)."""
    version = header[1] >> 3 & 3  # 3: MPEG 1; 2: MPEG 2; 0: MPEG 2.5
    rates = BIT_RATES["version 1" if version == 3 else "version 2"]
    bits_per_second = 1000 * rates[header[2] >> 4]
    sample_rate_hz = SAMPLE_RATES[header[2] >> 2 & 3] // {3: 1, 2: 2, 0: 4}[version]
    bytes_by_rate = 144 if version == 3 else 72
    return bytes_by_rate * bits_per_second // sample_rate_hz + (header[2] >> 1 & 1)


def _samples_per_frame(content: bytes, frame: int) -> int:
    return 1152 if content[frame + 1] >> 3 & 3 == 3 else 576


def _side_bytes(header: bytes) -> int:
    """Returns the length of the side information, which a Xing tag follows."""
    is_mono = header[3] >> 6 == 3
    if header[1] >> 3 & 3 == 3:
        return 17 if is_mono else 32
    return 9 if is_mono else 17


def _tag_start(content: bytes, frame: int) -> int | None:
    """Returns the first byte of the tag in a frame; None if the frame is one of sound."""
    header = content[frame : frame + 4]
    end = frame + _frame_bytes(header)
    xing, vbri = frame + 4 + _side_bytes(header), frame + VBRI_START
    if content[xing : xing + 4] in XING_TAGS and xing + XING_COUNT + 4 <= end:
        return xing
    is_vbri = content[vbri : vbri + 4] == b"VBRI" and vbri + VBRI_COUNT + 4 <= end
    return vbri if is_vbri else None


def _tag_frame(header: bytes, num_frames: int) -> bytes:
    """Builds a frame with a Xing tag, for frames with a given header.

    As for other files with a tag, the decoder then drops its own delay of 529 samples.
    """
    bit_rate = 1 if header[1] >> 3 & 3 == 3 else 4  # 32 kbit/s
    header = bytes([0xFF, header[1] | 1, bit_rate << 4 | header[2] & 0x0C, header[3]])
    tag = b"Xing" + struct.pack(">II", HAS_COUNT, num_frames)
    return (header + bytes(_side_bytes(header)) + tag).ljust(_frame_bytes(header), b"\0")


def _estimated_samples(content: bytes) -> int:
    """Returns the length that libsndfile computes; -1 if it cannot open the file."""
    import soundfile

    try:
        with soundfile.SoundFile(SoundBytes(content)) as file:
            return file.frames
    except soundfile.SoundFileError:
        return -1
