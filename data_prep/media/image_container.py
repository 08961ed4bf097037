"""Opens an image without decoding it, and validates its header.

This module adds checks that Pillow lacks.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

from PIL import Image, UnidentifiedImageError

from data_prep.media.decode import PILLOW_ERRORS, check_pixels
from data_prep.media.formats import MediaError

PILLOW_NAMES = {"jpg": "JPEG", "tiff": "TIFF"}  # other names are the format in upper case
MAX_METADATA_BYTES = 2**20  # limit for a decompressed text or profile in a PNG
MAX_JPEG_SCANS = 100  # each scan may cover the whole image; common programs write about 10
START_OF_SCAN = b"\xff\xda"
TIFF_TILE_WIDTH, TIFF_TILE_LENGTH = 322, 323


def open_image(content: bytes, format_name: str, *, max_pixels: int) -> Image.Image:
    """Opens an image in Pillow, without decoding it.

    Args:
        content: bytes of a file.
        format_name: format found by `image_format`.
        max_pixels: maximum of height x width in the header.

    Raises:
        MediaError: if the image is unusable. The reason is too_many_pixels, no_pixels, truncated,
            metadata_too_large, too_many_scans or undecodable.
    """
    if format_name == "png":
        _check_png(content, max_pixels=max_pixels)
    if format_name == "webp":
        _check_webp(content, max_pixels=max_pixels)
    try:
        name = PILLOW_NAMES.get(format_name, format_name.upper())
        image = Image.open(io.BytesIO(content), formats=(name,))
        is_bad_tile = format_name == "tiff" and _tile_pixels(image) > max_pixels
    except Image.DecompressionBombError as error:
        raise MediaError(f"not decoded: {error}", reason="too_many_pixels") from None
    except UnidentifiedImageError:
        raise MediaError(f"unreadable {format_name}: damaged header") from None
    except PILLOW_ERRORS as error:
        raise MediaError(f"unreadable {format_name}: {error}") from None
    check_pixels(image.height, image.width, max_pixels=max_pixels)
    if is_bad_tile:
        raise MediaError("TIFF with a tile larger than the limit", reason="too_many_pixels")
    if format_name == "jpg" and "progressive" in image.info:
        num_scans = content.count(START_OF_SCAN)
        if num_scans > MAX_JPEG_SCANS:
            raise MediaError(
                f"JPEG with {num_scans} scans; expected at most {MAX_JPEG_SCANS}",
                reason="too_many_scans",
            )
    return image


def _check_png(content: bytes, *, max_pixels: int) -> None:
    """Checks the image size, the CRC of every chunk, and the length of decompressed metadata."""
    width, height = struct.unpack(">II", content[16:24].ljust(8, b"\0"))
    check_pixels(height, width, max_pixels=max_pixels)
    for name, start, size in _png_chunks(content):
        checksum = int.from_bytes(content[start + size : start + size + 4], "big")
        if zlib.crc32(memoryview(content)[start - 4 : start + size]) != checksum:
            raise MediaError(f"PNG: the {name!r} chunk at byte {start - 8} is damaged")
        if name in (b"iCCP", b"zTXt", b"iTXt"):
            _check_unpacked(name, content[start : start + size])


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yields (name, first byte, size) of every chunk up to IEND."""
    place = 8
    while place + 12 <= len(content):
        size, name = struct.unpack_from(">I4s", content, place)
        if place + 12 + size > len(content):
            break
        yield name, place + 8, size
        place += 12 + size
        if name == b"IEND":
            return
    raise MediaError(f"PNG truncated: no IEND in {len(content)} bytes", reason="truncated")


def _check_unpacked(name: bytes, chunk: bytes) -> None:
    # The keyword ends with NUL; the fields before the compressed bytes depend on the chunk.
    _, _, rest = chunk.partition(b"\0")
    if name == b"iTXt":
        if rest[:1] != b"\1":  # not compressed
            return
        _, _, rest = rest[2:].partition(b"\0")  # language
        _, _, rest = rest.partition(b"\0")  # keyword, translated
    else:
        rest = rest[1:]  # method
    unpacked = zlib.decompressobj()
    try:
        unpacked.decompress(rest, MAX_METADATA_BYTES)
        is_larger = bool(unpacked.unconsumed_tail)
    except zlib.error:
        return  # Pillow and browsers ignore such a chunk
    if is_larger:
        raise MediaError(
            f"PNG: the decompressed {name.decode()} chunk exceeds {MAX_METADATA_BYTES} bytes",
            reason="metadata_too_large",
        )


def _check_webp(content: bytes, *, max_pixels: int) -> None:
    # Pillow allocates the canvas of a WebP before it reports the size.
    size = int.from_bytes(content[4:8], "little")
    if size + 8 > len(content):
        raise MediaError(
            f"WebP truncated: expected {size + 8} bytes, found {len(content)}", reason="truncated"
        )
    kind, body = content[12:16], content[20:30].ljust(10, b"\0")
    if kind == b"VP8X":
        width = 1 + int.from_bytes(body[4:7], "little")
        height = 1 + int.from_bytes(body[7:10], "little")
    elif kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    else:
        width, height = (number & 0x3FFF for number in struct.unpack_from("<HH", body, 6))
    check_pixels(height, width, max_pixels=max_pixels)


def _tile_pixels(image: Image.Image) -> int:
    """Returns the number of pixels in a TIFF tile, which may be much larger than the image."""
    width, length = (image.tag_v2.get(tag, 0) for tag in (TIFF_TILE_WIDTH, TIFF_TILE_LENGTH))
    return width * length
