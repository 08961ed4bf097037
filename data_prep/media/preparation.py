"""Preparation of a media file as one or more samples.

bytes -> detect the format -> check limits in the header -> decode once, strictly
      -> keep or re-encode -> measures, fingerprint, filters
"""

from __future__ import annotations

from data_prep.config import AudioOptions, ImageOptions
from data_prep.media.audio_preparation import prepare_audio
from data_prep.media.formats import PreparedMedia
from data_prep.media.image_preparation import prepare_image


def prepare_media(
    content: bytes, *, kind: str, image: ImageOptions, audio: AudioOptions
) -> list[PreparedMedia]:
    """Returns the stored form of a media file: one sample, or the clips of a long recording.

    The result depends only on the bytes and the options.

    Args:
        content: bytes of the file.
        kind: "image" or "audio".
        image: options for images.
        audio: options for audio clips.

    Raises:
        MediaError: if the file cannot be used; `reason` is a stable identifier.
    """
    if kind == "image":
        return [prepare_image(content, image)]
    return prepare_audio(content, audio)
