"""Kinds of bad media: name -> (function that makes the bytes, media kind, reason).

The last entries are good files that the filters in IMAGE_FILTERS and AUDIO_FILTERS drop. With
these options every entry is rejected for its reason.
"""

import io
import pickle
import struct
import zipfile
import zlib

import numpy as np
import soundfile
from PIL import Image

IMAGE_FILTERS = {"min_side": 8, "max_aspect_ratio": 20.0}
AUDIO_FILTERS = {"min_peak_dbfs": -60.0, "min_seconds": 0.05}
SAMPLE_RATE_HZ = 8000


# ---------------------------------------------------------------------------------- good files


def picture(image_format: str = "JPEG", *, size: tuple[int, int] = (48, 40), **options) -> bytes:
    """Encodes an image of `size` (width, height), smooth enough for every format."""
    rows, columns = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([rows * 5, columns * 5, (rows + columns) * 3], axis=-1) % 256
    return saved(Image.fromarray(pixels.astype(np.uint8)), image_format, **options)


def saved(image: Image.Image, image_format: str, **options) -> bytes:
    sink = io.BytesIO()
    image.save(sink, image_format, **options)
    return sink.getvalue()


def sound(
    sound_format: str = "WAV",
    *,
    samples: np.ndarray | None = None,
    sample_rate_hz: int = SAMPLE_RATE_HZ,
    subtype: str | None = None,
) -> bytes:
    """Encodes half a second of a tone, or `samples`."""
    if samples is None:
        samples = 0.5 * np.sin(np.arange(SAMPLE_RATE_HZ // 2) * 0.2)
    sink = io.BytesIO()
    soundfile.write(sink, samples, sample_rate_hz, format=sound_format, subtype=subtype)
    return sink.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, pixels: bytes, *, bit_depth: int = 8, extra: bytes = b"") -> bytes:
    """Builds a grey PNG whose header may claim anything.

    Args:
        width: width in the header.
        height: height in the header.
        pixels: compressed rows, each preceded by its filter byte.
        bit_depth: bit depth in the header.
        extra: chunks before the pixels.
    """
    header = struct.pack(">IIBBBBB", width, height, bit_depth, 0, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + extra + png_chunk(b"IDAT", pixels)
    return b"\x89PNG\r\n\x1a\n" + chunks + png_chunk(b"IEND", b"")


def patched(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


# ------------------------------------------------------------------------------------ pictures


def _jpeg_zeroed_scan() -> bytes:
    content = picture(size=(256, 256), quality=95)
    middle = len(content) // 2
    return patched(content, middle, bytes(len(content) // 4))


def _jpeg_claiming_65500() -> bytes:
    content = picture()
    return patched(content, content.index(b"\xff\xc0") + 5, struct.pack(">HH", 65_500, 65_500))


def _jpeg_of_many_scans() -> bytes:
    content = picture(progressive=True)
    scan = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + scan * 200 + content[-2:]


def _jpeg_without_scan() -> bytes:
    content = picture()
    return content[: content.index(b"\xff\xda")]


def _cmyk_jpeg_truncated() -> bytes:
    content = saved(Image.new("CMYK", (200, 200), (10, 200, 30, 4)), "JPEG")
    return content[: len(content) * 3 // 4]


def _png_bomb() -> bytes:
    """100 million pixels in 12 kB."""
    return png(10_000, 10_000, zlib.compress(bytes(1251 * 10_000)), bit_depth=1)


def _png_with(name: bytes, before: bytes) -> bytes:
    """A tiny PNG with a chunk that unpacks to 8 MB."""
    packed = zlib.compress(bytes(2**23))
    return png(1, 1, zlib.compress(bytes(2)), extra=png_chunk(name, before + packed))


def _png_bad_checksum() -> bytes:
    content = bytearray(picture("PNG"))
    content[-20] ^= 1  # the last bytes of the pixels' checksum
    return bytes(content)


def _png_of_a_cut_stream() -> bytes:
    rows = np.random.default_rng(0).integers(0, 256, (64, 65), np.uint8)
    rows[:, 0] = 0
    return png(64, 64, zlib.compress(rows.tobytes())[:2000])


def _animation(image_format: str) -> bytes:
    frames = [Image.new("RGB", (20, 20), (each * 40, 90, 200)) for each in range(4)]
    return saved(frames[0], image_format, save_all=True, append_images=frames[1:])


def _tiff(*entries: tuple[int, int]) -> bytes:
    """A TIFF of bare header entries (tag, value), with a few bytes for its pixels."""
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + fields + bytes(4) + bytes(64)


def _tiff_claiming_60000() -> bytes:
    return _tiff((256, 60_000), (257, 60_000), (258, 8), (262, 1), (273, 120), (278, 60_000))


def _tiff_of_a_huge_tile() -> bytes:
    tile = ((322, 40_000), (323, 40_000), (324, 150), (325, 8))
    return _tiff((256, 16), (257, 16), (258, 8), (259, 8), (262, 1), *tile)


def _gif_of_a_huge_canvas() -> bytes:
    return patched(picture("GIF"), 6, struct.pack("<HH", 65_535, 65_535))


def _webp_of_a_huge_canvas() -> bytes:
    return patched(_animation("WEBP"), 24, b"\xff\x3f\0\xff\x3f\0")


def _pickle() -> bytes:
    return pickle.dumps({"image": [1, 2, 3]})


def _zip() -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("picture.jpg", picture())
    return sink.getvalue()


SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
HTML = b"<!DOCTYPE html><html><head><title>404 Not Found</title></head></html>"
M4A = b"\0\0\0\x20ftypM4A \0\0\0\0M4A mp42isom\0\0\0\0" + bytes(64)
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)


# --------------------------------------------------------------------------------------- audio


def _cut(sound_format: str, subtype: str | None = None) -> bytes:
    content = sound(sound_format, subtype=subtype)
    return content[: len(content) * 2 // 3]


def _wav_of(*, rate: int) -> bytes:
    return patched(sound(), 24, struct.pack("<I", rate))


def _wav_with(value: float) -> bytes:
    samples = np.zeros(800, np.float32)
    samples[400] = value
    return sound(samples=samples, subtype="FLOAT")


def _flac_claiming(num_samples: int, *, sample_rate_hz: int = SAMPLE_RATE_HZ) -> bytes:
    """The number is the last 36 of the 64 bits that start with the rate, at byte 18."""
    content = sound("FLAC")
    (fields,) = struct.unpack_from(">Q", content, 18)
    kept = fields & ((1 << 44) - (1 << 36))  # channels and bits per sample
    return patched(content, 18, struct.pack(">Q", sample_rate_hz << 44 | kept | num_samples))


def _ogg_without_a_page() -> bytes:
    content = sound("OGG", samples=np.random.default_rng(0).uniform(-0.5, 0.5, 60_000))
    starts = [place for place in range(len(content)) if content[place : place + 4] == b"OggS"]
    return content[: starts[2]] + content[starts[3] :]


def _flac_with_a_flipped_bit() -> bytes:
    content = bytearray(sound("FLAC"))
    content[len(content) * 3 // 4] ^= 8
    return bytes(content)


BAD_MEDIA = {
    "empty_image": (lambda: b"", "image", "empty_file"),
    "text_named_jpg": (lambda: b"no picture\n" * 9, "image", "unknown_format"),
    "utf16_text": (lambda: "no picture".encode("utf-16"), "image", "unknown_format"),
    "html_error_page": (lambda: HTML, "image", "unknown_format"),
    "svg": (lambda: SVG, "image", "unknown_format"),
    "pdf": (lambda: b"%PDF-1.7\n" + bytes(99), "image", "unknown_format"),
    "pickle": (_pickle, "image", "unknown_format"),
    "zip": (_zip, "image", "unknown_format"),
    "heic": (lambda: HEIC, "image", "unknown_format"),
    "zeros": (lambda: bytes(5000), "image", "unknown_format"),
    "audio_named_jpg": (sound, "image", "wrong_media_kind"),
    "jpeg_start_only": (lambda: b"\xff\xd8\xff", "image", "undecodable"),
    "jpeg_truncated": (lambda: picture()[:-200], "image", "undecodable"),
    "jpeg_zeroed_scan": (_jpeg_zeroed_scan, "image", "undecodable"),
    "jpeg_without_scan": (_jpeg_without_scan, "image", "undecodable"),
    "jpeg_claiming_65500": (_jpeg_claiming_65500, "image", "too_many_pixels"),
    "jpeg_of_many_scans": (_jpeg_of_many_scans, "image", "too_many_scans"),
    "cmyk_jpeg_truncated": (_cmyk_jpeg_truncated, "image", "undecodable"),
    "png_of_50000": (lambda: png(50_000, 50_000, b""), "image", "too_many_pixels"),
    "png_bomb": (_png_bomb, "image", "too_many_pixels"),
    "png_text_bomb": (lambda: _png_with(b"zTXt", b"k\0\0"), "image", "metadata_too_large"),
    "png_utf8_text_bomb": (
        lambda: _png_with(b"iTXt", b"k\0\1\0\0\0"),
        "image",
        "metadata_too_large",
    ),
    "png_profile_bomb": (lambda: _png_with(b"iCCP", b"k\0\0"), "image", "metadata_too_large"),
    "png_truncated": (lambda: picture("PNG")[:-30], "image", "truncated"),
    "png_bad_checksum": (_png_bad_checksum, "image", "undecodable"),
    "png_of_a_cut_stream": (_png_of_a_cut_stream, "image", "undecodable"),
    "png_of_no_pixels": (lambda: png(0, 0, b""), "image", "no_pixels"),
    "apng": (lambda: _animation("PNG"), "image", "animated"),
    "webp_truncated": (lambda: picture("WEBP")[:-30], "image", "truncated"),
    "webp_animated": (lambda: _animation("WEBP"), "image", "animated"),
    "webp_of_a_huge_canvas": (_webp_of_a_huge_canvas, "image", "too_many_pixels"),
    "gif_animated": (lambda: _animation("GIF"), "image", "animated"),
    "gif_of_a_huge_canvas": (_gif_of_a_huge_canvas, "image", "too_many_pixels"),
    "gif_truncated": (lambda: picture("GIF")[:-300], "image", "undecodable"),
    "bmp_truncated": (lambda: picture("BMP")[:-300], "image", "undecodable"),
    "avif_truncated": (lambda: picture("AVIF")[:-100], "image", "undecodable"),
    "tiff_claiming_60000": (_tiff_claiming_60000, "image", "too_many_pixels"),
    "tiff_of_a_huge_tile": (_tiff_of_a_huge_tile, "image", "too_many_pixels"),
    "tiff_of_several_pages": (lambda: _animation("TIFF"), "image", "animated"),
    "tiff_of_floats": (
        lambda: saved(Image.new("F", (20, 20), 0.5), "TIFF"),
        "image",
        "unsupported_colors",
    ),
    "empty_audio": (lambda: b"", "audio", "empty_file"),
    "text_named_wav": (lambda: b"no sound\n" * 9, "audio", "unknown_format"),
    "html_named_mp3": (lambda: HTML, "audio", "unknown_format"),
    "m4a": (lambda: M4A, "audio", "unknown_format"),
    "image_named_wav": (picture, "audio", "wrong_media_kind"),
    "wav_of_no_samples": (lambda: sound(samples=np.zeros(0)), "audio", "no_samples"),
    "wav_header_only": (lambda: sound()[:44], "audio", "truncated"),
    "wav_without_sound_chunk": (lambda: sound()[:36], "audio", "undecodable"),
    "wav_truncated": (lambda: _cut("WAV"), "audio", "truncated"),
    "rf64_truncated": (lambda: _cut("RF64"), "audio", "truncated"),
    "aiff_truncated": (lambda: _cut("AIFF"), "audio", "truncated"),
    "flac_truncated": (lambda: _cut("FLAC"), "audio", "undecodable"),
    "flac_flipped_bit": (_flac_with_a_flipped_bit, "audio", "undecodable"),
    "ogg_truncated": (lambda: _cut("OGG"), "audio", "truncated"),
    "ogg_without_a_page": (_ogg_without_a_page, "audio", "undecodable"),
    "opus_truncated": (lambda: _cut("OGG", "OPUS"), "audio", "truncated"),
    "mp3_truncated": (lambda: _cut("MP3"), "audio", "truncated"),
    "wav_with_nan": (lambda: _wav_with(np.nan), "audio", "not_finite"),
    "wav_with_infinity": (lambda: _wav_with(np.inf), "audio", "not_finite"),
    "wav_of_0_hz": (lambda: _wav_of(rate=0), "audio", "bad_sample_rate"),
    "wav_of_1_hz": (lambda: _wav_of(rate=1), "audio", "bad_sample_rate"),
    "wav_of_8_channels": (lambda: sound(samples=np.zeros((99, 8))), "audio", "too_many_channels"),
    "flac_of_hours": (
        lambda: sound("FLAC", samples=np.zeros(5_000_000, np.int16), sample_rate_hz=1000),
        "audio",
        "too_long",
    ),
    "flac_claiming_months": (lambda: _flac_claiming(2**36 - 1), "audio", "too_long"),
    "flac_of_a_huge_rate": (
        lambda: _flac_claiming(3000 * 655_350, sample_rate_hz=655_350),
        "audio",
        "too_long",
    ),
    # Good files, but for the filters.
    "tiny_picture": (lambda: picture(size=(7, 7)), "image", "image_too_small"),
    "narrow_picture": (lambda: picture(size=(400, 10)), "image", "image_aspect_ratio"),
    "silent_clip": (lambda: sound(samples=np.zeros(4000)), "audio", "audio_silent"),
    "short_clip": (lambda: sound(samples=0.5 * np.ones(300)), "audio", "audio_too_short"),
}
