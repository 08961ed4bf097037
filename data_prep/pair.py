"""One pair of media path and caption, as it stands in the input, and what can be wrong with it.

A pair that cannot be used is not dropped where it is read: it carries a short, stable reason, so
that it is counted and listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.shard_format import MEDIA_EXTENSIONS, media_kind_of


@dataclass(frozen=True, slots=True)
class Pair:
    """One caption of one media file, or the reason why it cannot be used."""

    row: int  # line of the manifest, or place in the sorted folder, from 1
    media: str  # path as given
    caption: str
    class_name: str | None = None
    uid: str | None = None
    reason: str | None = None  # why the pair is rejected; None: it is good so far
    detail: str = ""


def checked_pair(
    media_kind: str,
    *,
    row: int,
    media: Any,
    caption: Any,
    class_name: Any = None,
    uid: Any = None,
) -> Pair:
    """The pair, with the reason of the first thing that is wrong with it."""
    texts = {"media": media, "caption": caption, "class_name": class_name, "uid": uid}
    texts = {name: "" if text is None else str(text).strip() for name, text in texts.items()}
    reason, detail = _rejection(media_kind, texts)
    return Pair(
        row=row,
        media=texts["media"],
        caption=texts["caption"],
        class_name=texts["class_name"] or None,
        uid=texts["uid"] or None,
        reason=reason,
        detail=detail,
    )


def _rejection(media_kind: str, texts: dict[str, str]) -> tuple[str | None, str]:
    for name, text in texts.items():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return "not_utf8", f"{name}: {error.reason} at character {error.start}"
    if "\0" in texts["media"]:
        return "missing_file", "the path holds a NUL character"
    if not texts["media"]:
        return "missing_media_path", "the media column is blank"
    extension = extension_of(texts["media"])
    if media_kind_of(extension) != media_kind:
        known = " ".join(f".{name}" for name in MEDIA_EXTENSIONS[media_kind])
        return "unknown_extension", f"expected one of {known}, found .{extension}"
    if not texts["caption"]:
        return "empty_caption", ""
    return None, ""


def extension_of(media: str) -> str:
    """Lower-case extension of a path, without the dot."""
    return Path(media).suffix.lower().removeprefix(".")


def unreadable_row(row: int, reason: str, detail: str) -> Pair:
    """The pair that stands for a row from which no media path could be read."""
    return Pair(row=row, media="", caption="", reason=reason, detail=detail)
