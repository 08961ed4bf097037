"""Completeness and length of MP3 files, counted frame by frame.

The length of an MP3 file is in a Xing or VBRI tag, stored as a first frame without sound. If there
is none, libsndfile computes a length from the bit rate of the first frame. It reads no further than
that length, so the end of a file with a variable bit rate would be missing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

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
# Headers in a row that mark the first frame after bytes that are no frame.
FRAMES_TO_RESUME = 3


def complete_mp3(content: bytes) -> bytes:
    """Checks that the last frame of a file is complete, and corrects the length in its tag.

    Returns:
        The bytes of the file, unchanged if libsndfile reads all of its frames; otherwise with the
        number of frames in a tag.

    Raises:
        MediaError: if a frame is truncated; the reason is truncated.
    """
    frames = list(_frames(content))
    if not frames:
        return content
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


def _with_tag(content: bytes, frames: list[int], *, start: int) -> bytes:
    """Replaces the bytes from `start` to the first frame by a tag with the number of frames."""
    header = content[frames[0] : frames[0] + 4]
    return content[:start] + _tag_frame(header, len(frames)) + content[frames[0] :]


def _frames(content: bytes) -> Iterator[int]:
    """Yields the first byte of every frame; tags and padding between frames are skipped."""
    place = id3_bytes(content)
    while True:
        while is_mp3_frame(content[place : place + 4]):
            size = _frame_bytes(content[place : place + 4])
            if place + size > len(content):
                raise MediaError(
                    f"MP3 truncated: expected a frame of {size} bytes at byte {place}, "
                    f"found {len(content) - place}",
                    reason="truncated",
                )
            yield place
            place += size
        found = _resumed(content, place)
        if found is None:
            return
        place = found


def _resumed(content: bytes, place: int) -> int | None:
    """Returns the first byte of the frames after a gap; None if there are no more."""
    while (place := content.find(b"\xff", place)) >= 0:
        following = place
        for _ in range(FRAMES_TO_RESUME):
            header = content[following : following + 4]
            if not is_mp3_frame(header):
                break
            following += _frame_bytes(header)
        else:
            if following <= len(content):
                return place
        place += 1
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
