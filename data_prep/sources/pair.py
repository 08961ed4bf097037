"""One pair of media and caption, as it stands in the input, and what can be wrong with it.

A pair that cannot be used is not dropped where it is read: it carries a short, stable reason, so
that it is counted and listed. What a filter finds is either such a reason or only a mark.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

# A clip that a filter drops while other clips of the same sound stay is no rejected pair: it is
# counted under the filter's name after this.
CLIP_PREFIX = "clip_"


@dataclass(frozen=True, slots=True)
class Pair:
    """One caption of one media file, or the reason why it cannot be used."""

    row: int  # line of the manifest, or place in the input, from 1
    media: str  # path or URL as given, or the file that holds the bytes
    caption: str
    place: str | None = None  # where the bytes are inside `media`, in words of the source's format
    class_name: str | None = None
    uid: str | None = None
    kept: str | None = None  # values of keep_columns, as a JSON object
    language: str | None = None
    marks: tuple[str, ...] = ()  # filters that would have dropped it
    reason: str | None = None  # why the pair is rejected; None: it is good so far
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Item:
    """What becomes one sample (or several clips): one media file and its captions."""

    number: int  # from 0, over the whole input; the sample's key
    media: str
    place: str | None
    pairs: list[Pair]


class BadItemError(ValueError):
    """The media of an item cannot be used."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


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
    """The pair, with the reason of the first thing that is wrong with it.

    Args:
        row: and all others: as in Pair.
        is_file_name: `media` is the name of a file that was found, whose spaces belong to it.
    """
    values = {"media": media, "caption": caption, "class_name": class_name, "uid": uid}
    texts = {name: _text_of(value).strip() for name, value in values.items()}
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


def _text_of(value: Any) -> str:
    """As text; nothing where nothing is given, which tables also write as NaN."""
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
        return "missing_media_path", "the media column is blank"
    if not texts["caption"]:
        return "empty_caption", ""
    return None, ""


def unreadable_row(row: int, reason: str, detail: str) -> Pair:
    """The pair that stands for a row from which no media path could be read."""
    return Pair(row=row, media="", caption="", reason=reason, detail=detail)
