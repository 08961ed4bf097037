"""Length of FLAC files, computed from their last frame.

The length in the header is 0 in a file that was written to a pipe, and libsndfile reads no further
than the header says. The position of the last frame, plus its samples, is the length
(RFC 9639, 8.2 and 9.1).
"""

from __future__ import annotations

from data_prep.media.formats import MediaError, id3_bytes

MAX_FRAME_BYTES = 1 << 18  # searched for the last frame
MAX_CHECKSUMS = 16  # limits the time for bytes that look like many frames
ID3V1_BYTES = 128
BLOCK_SAMPLES = {1: 192, **{code: 576 << code - 2 for code in range(2, 6)}}
BLOCK_SAMPLES |= {code: 256 << code - 8 for code in range(8, 16)}
TOTAL_AT = 8 + 13  # from the signature to the byte whose lower half begins the length, of 36 bits


def complete_flac(content: bytes) -> bytes:
    """Corrects the length in a header that states none, or less than the file contains.

    A file that contains less than its header states is left to the decoder, which refuses it.

    Raises:
        MediaError: if the header states no length and the last frame is damaged; the reason is
            truncated.
    """
    total_at = id3_bytes(content) + TOTAL_AT
    if len(content) < total_at + 5:
        return content
    stated = int.from_bytes(content[total_at : total_at + 5], "big") & (1 << 36) - 1
    contained = _contained_samples(content, with_checksum=False)
    if stated and (contained is None or contained <= stated):
        return content
    contained = _contained_samples(content, with_checksum=True)
    if contained is not None:
        total = (content[total_at] >> 4 << 36 | contained).to_bytes(5, "big")
        return content[:total_at] + total + content[total_at + 5 :]
    if stated:
        return content
    raise MediaError(
        "FLAC truncated: its header states no length, and its last frame is incomplete",
        reason="truncated",
    )


def _contained_samples(content: bytes, *, with_checksum: bool) -> int | None:
    """Returns the samples up to the end of the last frame; None if no such frame is found.

    Args:
        content: bytes of a file.
        with_checksum: also check the CRC16 over the whole frame, which takes milliseconds.
    """
    end = len(content)
    if content[-ID3V1_BYTES:][:3] == b"TAG":
        end -= ID3V1_BYTES
    lowest, place = max(0, end - MAX_FRAME_BYTES), end
    header = id3_bytes(content) + 8
    block_samples = int.from_bytes(content[header : header + 2], "big")
    num_found = 0
    while (place := content.rfind(b"\xff", lowest, place)) >= 0:
        end_sample = _end_sample(content[place : place + 16], block_samples)
        if end_sample is None:
            continue
        num_found += 1
        if not with_checksum or (num_found <= MAX_CHECKSUMS and not _crc16(content[place:end])):
            return end_sample
    return None


def _end_sample(header: bytes, block_samples: int) -> int | None:
    """Returns the samples up to the end of a frame; None if the bytes are not a frame's header.

    Args:
        header: 16 bytes.
        block_samples: samples of every frame but the last, if their number is fixed.
    """
    if len(header) < 6 or header[1] & 0xFE != 0xF8 or header[3] & 1:
        return None
    block_code, rate_code = header[2] >> 4, header[2] & 15
    if block_code == 0 or rate_code == 15 or header[3] >> 4 > 10 or header[3] >> 1 & 7 == 3:
        return None
    number, place = _coded_number(header)
    if number is None:
        return None
    samples = BLOCK_SAMPLES.get(block_code)
    if samples is None:  # 6 and 7: the number follows
        num_bytes = block_code - 5
        samples = int.from_bytes(header[place : place + num_bytes], "big") + 1
        place += num_bytes
    place += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if place >= len(header) or _crc8(header[:place]) != header[place]:
        return None
    has_fixed_blocks = not header[1] & 1
    return (number * block_samples if has_fixed_blocks else number) + samples


def _coded_number(header: bytes) -> tuple[int | None, int]:
    """Returns the number of the frame or sample, coded as UTF-8 is, and the byte after it."""
    first = header[4]
    if first < 0x80:
        return first, 5
    num_more = 8 - (first ^ 0xFF).bit_length() - 1  # leading ones, without the first byte
    more = header[5 : 5 + num_more]
    if not 1 <= num_more <= 6 or len(more) < num_more or any(b & 0xC0 != 0x80 for b in more):
        return None, 5
    number = first & (0x3F >> num_more)
    for byte in more:
        number = number << 6 | byte & 0x3F
    return number, 5 + num_more


def _crc_table(polynomial: int, bits: int) -> tuple[int, ...]:
    top, mask = 1 << bits - 1, (1 << bits) - 1
    table = []
    for byte in range(256):
        crc = byte << bits - 8
        for _ in range(8):
            crc = (crc << 1 ^ (polynomial if crc & top else 0)) & mask
        table.append(crc)
    return tuple(table)


CRC8_TABLE, CRC16_TABLE = _crc_table(0x07, 8), _crc_table(0x8005, 16)


def _crc8(content: bytes) -> int:
    crc = 0
    for byte in content:
        crc = CRC8_TABLE[crc ^ byte]
    return crc


def _crc16(content: bytes) -> int:
    """Computes FLAC's CRC16; 0 for a whole frame, which ends in its checksum."""
    crc = 0
    for byte in content:
        crc = (crc << 8 & 0xFF00) ^ CRC16_TABLE[crc >> 8 ^ byte]
    return crc
