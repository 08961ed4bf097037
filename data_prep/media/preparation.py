"""From the bytes of a media file, as found, to the bytes and measures of one or more samples.

bytes -> format, by content -> limits, by header -> decoded once, strictly
      -> kept as they are, or re-encoded -> measures, fingerprint, filters
"""

from __future__ import annotations

from data_prep.config import AudioOptions, ImageOptions
from data_prep.media.audio_preparation import prepare_audio
from data_prep.media.formats import PreparedMedia
from data_prep.media.image_preparation import prepare_image


def prepare_media(
    content: bytes, *, kind: str, image: ImageOptions, audio: AudioOptions
) -> list[PreparedMedia]:
    """What is stored of a media file: one sample, or the clips that a long recording is cut into.

    The same bytes and options always give the same result.

    Args:
        content: the bytes of the file.
        kind: "image" or "audio".
        image: how pictures are prepared.
        audio: how clips are prepared.

    Raises:
        MediaError: it cannot be used; its `reason` is a stable word.
    """
    if kind == "image":
        return [prepare_image(content, image)]
    return prepare_audio(content, audio)
