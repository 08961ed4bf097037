"""A pair of media and caption as read from an input, and the reasons to reject it.

Readers do not drop unusable pairs, but set a short, stable reason, so that every rejected pair is
counted and listed. A filter either sets such a reason or only adds a mark.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from typing import Any

# Prefix of the reasons under which dropped clips are counted. If other clips of the recording are
# kept, a dropped clip is not a rejected pair.
CLIP_PREFIX = "clip_"


@dataclass(frozen=True, slots=True)
class Pair:
    """One caption of one media file, or a sample of modalities, or the reason to reject it."""

    row: int  # line of the manifest, or number in the input, from 1
    media: str  # path or URL as given, or the file that holds the bytes
    caption: str
    place: str | None = None  # location of the bytes in `media`, in a format-specific notation
    class_name: str | None = None
    uid: str | None = None
    kept: str | None = None  # values of keep_columns, as a JSON object
    language: str | None = None
    marks: tuple[str, ...] = ()  # filters that flagged the pair without dropping it
    reason: str | None = None  # reason of the rejection; None: not rejected so far
    detail: str = ""
    parts: str | None = None  # modalities of a sample, as SampleParts.to_json returns them
    modality: str | None = None  # modality that is the reason of the rejection


@dataclass(frozen=True, slots=True)
class Item:
    """One media file and its captions: the origin of one sample, or of several clips."""

    number: int  # index in the whole input, from which the sample's key is derived
    media: str
    place: str | None
    pairs: list[Pair]
    column: str | None = None  # column of the container; None: the column of media


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file, or bytes in a container, that holds one modality of a sample."""

    media: str  # path or URL as given, or the container
    place: str | None = None  # location in the container; None: `media` is the file
    column: str | None = None  # column of a container with columns


@dataclass(frozen=True)
class SampleParts:
    """The modalities of one row; a modality that the row lacks is in none of them."""

    files: dict[str, FileRef] = field(default_factory=dict)
    texts: dict[str, list[str]] = field(default_factory=dict)
    vectors: dict[str, list[Any]] = field(default_factory=dict)
    labels: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files) + len(self.texts) + len(self.vectors)

    def to_json(self) -> str:
        files = {name: [r.media, r.place, r.column] for name, r in self.files.items()}
        values = {"files": files, "texts": self.texts, "vectors": self.vectors}
        return json.dumps(values | {"labels": self.labels}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SampleParts:
        """Parses the result of `to_json`."""
        values = json.loads(text)
        files = {name: FileRef(*each) for name, each in values.pop("files").items()}
        return cls(files=files, **values)


class BadItemError(ValueError):
    """The media of an item cannot be used."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


class BadModalityError(BadItemError):
    """One modality of a sample cannot be used."""

    def __init__(self, modality: str, reason: str, detail: str):
        super().__init__(reason, detail)
        self.modality = modality


def checked_pair(
    *,
    row: int,
    media: Any,
    caption: Any,
    place: str | None = None,
    class_name: Any = None,
    uid: Any = None,
    kept: str | None = None,
    is_file_name: bool = False,
) -> Pair:
    """Validates the values of a row and returns the pair; sets the reason of an unusable pair.

    Args:
        row, media, caption, place, class_name, uid, kept: values of the fields of `Pair`.
        is_file_name: whether `media` is the name of an existing file, whose spaces are kept.
    """
    values = {"media": media, "caption": caption, "class_name": class_name, "uid": uid}
    texts = {name: text_of(value).strip() for name, value in values.items()}
    if is_file_name or place is not None:
        texts["media"] = media
    reason, detail = _rejection(texts, values)
    return Pair(
        row=row,
        media=texts["media"],
        caption=texts["caption"],
        place=place,
        class_name=texts["class_name"] or None,
        uid=texts["uid"] or None,
        kept=kept,
        reason=reason,
        detail=detail,
    )


def text_of(value: Any) -> str:
    """Returns a value as text; a missing value is empty, and bytes become lone surrogates."""
    # Tables contain NaN for missing values.
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="surrogateescape")
    return str(value)


def _rejection(texts: dict[str, str], values: dict[str, Any]) -> tuple[str | None, str]:
    for name, text in texts.items():
        if isinstance(values[name], dict | list):
            return "not_text", f"{name}: expected text, found {text!r:.80}"
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return "not_utf8", f"{name}: {error.reason} at character {error.start}"
        if "\0" in text:
            return "nul_character", f"{name}: character {text.index(chr(0))} is NUL"
    if not texts["media"]:
        return "missing_media_path", "the media column is empty"
    if not texts["caption"]:
        return "empty_caption", ""
    return None, ""


def unreadable_row(row: int, reason: str, detail: str) -> Pair:
    """Returns the rejected pair for a row without a readable media path."""
    return Pair(row=row, media="", caption="", reason=reason, detail=detail)
