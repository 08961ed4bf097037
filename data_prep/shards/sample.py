"""Sample of a shard: members, captions and metadata, and errors for damaged data."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.errors import InputError
from data_prep.modalities.modality import MEDIA_EXTENSIONS

CAPTION_KEYS = ("captions", "caption", "text")  # of a .json, in order of preference
CAPTION_DIFFERS = "caption_differs"  # tag of a sample whose .json and .txt contradict each other


class CorruptSampleError(ValueError):
    """A sample whose bytes do not match the index or cannot be decoded."""


class BadShardError(InputError):
    """A shard that is missing or does not match manifest.jsonl.

    Transient failures (disk, network) raise OSError instead.
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
    """Splits a member name into (key, extension), as WebDataset does.

    The key ends at the first dot of the last path component.
    """
    folder, slash, file_name = name.rpartition("/")
    stem, _, extension = file_name.partition(".")
    return folder + slash + stem, extension.lower()


def media_kind_of(extension: str) -> str | None:
    """Returns the kind of media of an extension, "image" or "audio"; None for other extensions."""
    return next((kind for kind, known in MEDIA_EXTENSIONS.items() if extension in known), None)


def media_extension_of(members: Iterable[str], media_kind: str) -> str | None:
    """Returns the first extension of a kind of media, in alphabetical order; None without one."""
    known = (extension for extension in sorted(members) if media_kind_of(extension) == media_kind)
    return next(known, None)


def captions_of(sample: Sample, *, metadata: Mapping[str, Any] | None = None) -> list[str]:
    """Returns the captions of a sample: from `.json` (captions, caption or text), else from `.txt`.

    Args:
        metadata: content of the `.json` if it was parsed already.

    Raises:
        CorruptSampleError: if there is no caption, or it is not valid UTF-8 or JSON.
    """
    metadata = metadata_of(sample) if metadata is None else metadata
    for key in CAPTION_KEYS:
        if metadata.get(key):
            found = metadata[key] if isinstance(metadata[key], list) else [metadata[key]]
            captions = [text.strip() for text in found if isinstance(text, str) and text.strip()]
            if not captions:
                raise CorruptSampleError(
                    f"{sample}: .json: expected text in {key}, found {found!r}"
                )
            return captions
    try:
        caption = sample.members.get("txt", b"").decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise CorruptSampleError(f"{sample}: .txt is not UTF-8: {error}") from None
    if not caption:
        raise CorruptSampleError(f"{sample}: expected a caption in .json or .txt, found none")
    return [caption]


def captions_differ(in_json: Any, in_txt: str | None) -> bool:
    """Returns whether the captions of a `.json` and a `.txt` of one sample contradict each other.

    They agree if the `.txt` holds one of the captions of the `.json`, or all of them, one per line.
    Whitespace does not matter.

    Args:
        in_json: text or list of texts in the `.json`; None or empty without one.
        in_txt: content of the `.txt`; None without one.
    """
    if not in_json or in_txt is None or not in_txt.strip():
        return False
    listed = in_json if isinstance(in_json, list) else [in_json]
    captions = [" ".join(str(caption).split()) for caption in listed]
    lines = [" ".join(line.split()) for line in in_txt.splitlines() if line.strip()]
    return " ".join(lines) not in captions and lines != captions


def caption_tags(sample: Sample) -> list[str]:
    """Returns CAPTION_DIFFERS in a list if the captions of a sample contradict each other.

    Raises:
        CorruptSampleError: if the `.json` is not a JSON object.
    """
    in_txt = sample.members.get("txt", b"").decode("utf-8", errors="replace")
    differ = captions_differ(captions_in_json(metadata_of(sample)), in_txt)
    return [CAPTION_DIFFERS] if differ else []


def captions_in_json(metadata: Mapping[str, Any], keys: Sequence[str] = CAPTION_KEYS) -> Any:
    """Returns the value of the first of the keys that has one; None if none has."""
    return next((metadata[key] for key in keys if metadata.get(key)), None)


def metadata_of(sample: Sample) -> dict[str, Any]:
    """Parses the sample's `.json` member; returns {} if there is none.

    Raises:
        CorruptSampleError: if the member is not a JSON object.
    """
    if "json" not in sample.members:
        return {}
    try:
        metadata = json.loads(sample.members["json"])
    except ValueError as error:
        raise CorruptSampleError(f"{sample}: .json is not JSON: {error}") from None
    if not isinstance(metadata, dict):
        raise CorruptSampleError(
            f"{sample}: .json: expected an object, found {type(metadata).__name__}"
        )
    return metadata
