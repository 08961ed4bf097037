"""One sample of a shard: its members, captions and metadata, and the errors of damaged data."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from data_prep.errors import InputError

MEDIA_EXTENSIONS = {
    "image": ("jpg", "jpeg", "png", "webp"),
    "audio": ("flac", "wav", "mp3", "ogg", "opus"),
}


class CorruptSampleError(ValueError):
    """The bytes of one sample are not what the index says, or do not decode."""


class BadShardError(InputError):
    """A shard that is not there, or is not the one that manifest.jsonl records.

    What may pass, such as a disk or network that fails for the moment, is an OSError instead.
    """


@dataclass(frozen=True)
class Sample:
    """The members of one sample: extension without dot -> bytes."""

    shard: str
    key: str
    members: dict[str, bytes]

    def __str__(self) -> str:
        return f"{self.shard}: sample {self.key}"


def split_member_name(name: str) -> tuple[str, str]:
    """WebDataset's rule: the key runs to the first dot of the last path component."""
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return folder + slash + stem, extension.lower()


def media_kind_of(extension: str) -> str | None:
    """The kind of media an extension stands for ("image", "audio"), or None."""
    return next((kind for kind, known in MEDIA_EXTENSIONS.items() if extension in known), None)


def media_extension_of(members: Iterable[str], media_kind: str) -> str | None:
    """The first extension among `members`, by the alphabet, that is of this kind of media."""
    known = (extension for extension in sorted(members) if media_kind_of(extension) == media_kind)
    return next(known, None)


def captions_of(sample: Sample) -> list[str]:
    """The captions of a sample: from `.json` (captions, caption or text), else from `.txt`.

    Raises:
        CorruptSampleError: there is no caption, or it is not UTF-8 or JSON.
    """
    metadata = metadata_of(sample)
    for key in ("captions", "caption", "text"):
        if metadata.get(key):
            found = metadata[key] if isinstance(metadata[key], list) else [metadata[key]]
            captions = [text.strip() for text in found if isinstance(text, str) and text.strip()]
            if not captions:
                raise CorruptSampleError(f"{sample}: .json: {key} holds no text: {found!r}")
            return captions
    try:
        caption = sample.members.get("txt", b"").decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CorruptSampleError(f"{sample}: .txt is not UTF-8: {error}") from None
    if not caption:
        raise CorruptSampleError(f"{sample}: expected a caption in .json or .txt, found none")
    return [caption]


def metadata_of(sample: Sample) -> dict[str, Any]:
    """What the sample's `.json` member holds; empty where there is none.

    Raises:
        CorruptSampleError: the member is not a JSON object.
    """
    if "json" not in sample.members:
        return {}
    try:
        metadata = json.loads(sample.members["json"])
    except ValueError as error:
        raise CorruptSampleError(f"{sample}: .json is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise CorruptSampleError(f"{sample}: .json holds {type(metadata).__name__}, not an object")
    return metadata
