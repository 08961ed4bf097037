"""Detection of media formats by content, because file names are unreliable.

Only the formats listed here reach a decoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Formats that may be stored unchanged; others are re-encoded.
STORED_FORMATS = {"image": ("jpg", "png", "webp"), "audio": ("flac", "wav", "mp3", "ogg", "opus")}
# Content commonly found instead of media, for messages: prefix -> name.
OTHER_PREFIXES = {
    b"%PDF": "a PDF",
    b"PK\x03\x04": "a zip archive",
    b"\x1f\x8b": "gzip",
    b"Rar!": "a rar archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"8BPS": "a Photoshop file",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\x01\0": "a Windows icon",
    b"\x1aE\xdf\xa3": "Matroska or WebM",
    b"FLV": "Flash video",
    b"caff": "CAF audio",
    b".snd": "AU audio",
    b"riff": "W64 audio",
    b"wvpk": "WavPack",
    b"MThd": "MIDI",
    b"PAR1": "Parquet",
    b"SQLite": "SQLite",
}
TEXT_MARKS = {b"<svg": "SVG", b"<html": "an HTML page", b"<!doctype html": "an HTML page"}
AVIF_BRANDS = (b"avif", b"avis")
BMP_HEADER_BYTES = (12, 16, 40, 52, 56, 64, 108, 124)


class MediaError(ValueError):
    """Media that is damaged, too large, or of an unexpected kind.

    Attributes:
        reason: stable identifier under which the item is counted.
    """

    def __init__(self, detail: str, *, reason: str = "undecodable"):
        super().__init__(detail)
        self.reason = reason


class FormatMismatchError(MediaError):
    """The format of the bytes does not match their extension."""

    def __init__(self, detail: str):
        super().__init__(detail, reason="wrong_extension")


def image_format(content: bytes) -> str | None:
    """Returns jpg, png, webp, gif, bmp, tiff or avif; None for any other format."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "webp"
    if content[:6] in (b"GIF87a", b"GIF89a"):
        return "gif"
    if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    if content[4:8] == b"ftyp" and _has_brand(content, AVIF_BRANDS):
        return "avif"
    if content[:2] == b"BM" and int.from_bytes(content[14:18], "little") in BMP_HEADER_BYTES:
        return "bmp"
    return None


def audio_format(content: bytes) -> str | None:
    """Returns wav, flac, mp3, ogg, opus or aiff; None for any other format."""
    start = id3_bytes(content)
    head = content[start : start + 64]
    if head[:4] in (b"RIFF", b"RF64") and head[8:12] == b"WAVE":
        return "wav"
    if head.startswith(b"fLaC"):
        return "flac"
    if head.startswith(b"OggS"):
        return "opus" if b"OpusHead" in head else "ogg"
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    if start or is_mp3_frame(head):
        return "mp3"
    return None


def is_mp3_frame(header: bytes) -> bool:
    """Returns True if 4 bytes are a frame header of MPEG layer III."""
    return (
        len(header) >= 4
        and header[0] == 0xFF
        and header[1] & 0xE6 == 0xE2  # sync, and layer III
        and header[1] & 0x18 != 0x08  # reserved version
        and header[2] >> 4 not in (0, 15)  # free and forbidden bit rates
        and header[2] & 0x0C != 0x0C  # reserved sample rate
    )


def id3_bytes(content: bytes) -> int:
    """Returns the length in bytes of the ID3v2 tag at the start of a file; 0 if there is none."""
    if content[:3] != b"ID3" or len(content) < 10:
        return 0
    size = 0
    for seven_bits in content[6:10]:
        size = size << 7 | seven_bits & 0x7F
    return 10 + size + 10 * bool(content[5] & 0x10)


def check_kind(content: bytes, kind: str) -> str:
    """Detects the format, and checks that it belongs to a kind of media.

    Args:
        content: bytes of a file.
        kind: "image" or "audio".

    Returns:
        The name of the format.

    Raises:
        MediaError: if it does not; the reason is empty_file, wrong_media_kind or unknown_format.
    """
    if not content:
        raise MediaError(f"expected {kind}, found 0 bytes", reason="empty_file")
    formats = {"image": image_format(content), "audio": audio_format(content)}
    found = formats.pop(kind)
    if found is not None:
        return found
    (other,) = formats.values()
    if other is not None:
        raise MediaError(f"expected {kind}, found {other}", reason="wrong_media_kind")
    raise MediaError(f"expected {kind}, found {describe(content)}", reason="unknown_format")


def check_stored(format_name: str, kind: str, reencode: str) -> None:
    """Checks that a format can be stored, unchanged or re-encoded.

    Raises:
        MediaError: if it cannot; the reason is format_not_stored.
    """
    if reencode == "never" and format_name not in STORED_FORMATS[kind]:
        raise MediaError(
            f"{format_name} must be re-encoded, but {kind}.reencode=never",
            reason="format_not_stored",
        )


def describe(content: bytes) -> str:
    """Describes bytes of an unknown media format for an error message."""
    for prefix, name in OTHER_PREFIXES.items():
        if content.startswith(prefix):
            return name
    if content[4:8] == b"ftyp":
        return f"an MP4, M4A or HEIC file (brand {content[8:12].decode('ascii', 'replace')})"
    if content[:1] == b"\x80" and content[1:2] in b"\x02\x03\x04\x05":
        return "a Python pickle"
    head = content[:1000]
    for mark, name in TEXT_MARKS.items():
        if mark in head.lower():
            return name
    text = head.decode("utf-8", "ignore")
    if text.isascii() and text.replace("\n", " ").replace("\r", " ").isprintable():
        return f"text that starts with {text[:30]!r}"
    return f"bytes that start with {content[:8].hex(' ')}"


def _has_brand(content: bytes, brands: tuple[bytes, ...]) -> bool:
    """Returns True if an ISO media file has one of the brands as major or compatible brand."""
    length = min(int.from_bytes(content[:4], "big"), 256)
    names = [content[8:12]] + [content[at : at + 4] for at in range(16, length, 4)]
    return any(name in brands for name in names)


@dataclass(frozen=True, slots=True)
class PreparedMedia:
    """The stored form of one media file, or of one clip cut from it."""

    content: bytes
    extension: str
    measures: dict[str, Any]  # columns of shards.columns.MEASURES
    found: tuple[str, ...]  # filters that match it, in a fixed order
