"""Conversion of one row, sidecar or sample to pairs, shared by all formats."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import posixpath
from collections.abc import Collection, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from data_prep.config import CaptionSource, Columns
from data_prep.errors import InputError
from data_prep.shards.sample import (
    CAPTION_DIFFERS,
    CAPTION_KEYS,
    captions_differ,
    captions_in_json,
)
from data_prep.sources.pair import Pair, checked_pair
from data_prep.sources.text_lines import utf8_problem
from data_prep.storage import remote_file

MAX_SIDECAR_BYTES = 1 << 24


def pairs_of_row(
    *, row: int, media: Any, captions: Any, place: str | None = None, **fields: Any
) -> Iterator[Pair]:
    """Yields one pair per caption.

    Args:
        row: line or number in the input, from 1.
        media: path or URL, or the file that holds the bytes.
        captions: a text or a list of texts.
        place: location of the bytes in `media`.
        fields: class_name, uid, kept and is_file_name, as in `checked_pair`.
    """
    if not isinstance(captions, list):
        captions = [captions]
    for caption in captions or [None]:
        pair = checked_pair(row=row, media=media, caption=caption, place=place, **fields)
        if pair.reason is None:
            reason, detail = _rejection(pair)
            if reason is not None:
                pair = dataclasses.replace(pair, reason=reason, detail=detail)
        yield pair


def _rejection(pair: Pair) -> tuple[str | None, str]:
    # A relative path must stay inside media_root.
    is_relative = pair.place is None and not remote_file.is_absolute(pair.media)
    if is_relative and ".." in pair.media and remote_file.points_outside(pair.media):
        return "path_outside_root", f"{pair.media}: points outside media_root"
    if pair.kept is not None and utf8_problem(pair.kept):
        values = json.loads(pair.kept).items()
        name, problem = next((n, p) for n, v in values if (p := utf8_problem({n: v})))
        return "not_utf8", f"keep_columns: {name!r}: {problem}"
    return None, ""


def resolve_media_paths(
    pairs: Iterator[Pair], name: str, *, media_root: str | None
) -> Iterator[Pair]:
    """Resolves relative media paths against the folder of their manifest.

    Args:
        pairs: pairs of one manifest.
        name: name of the manifest, relative to the input's folder.
        media_root: configured folder or URL that replaces the manifest's folder, or None.
    """
    folder = posixpath.dirname(name)
    if not folder or media_root is not None:
        return pairs
    return (_below(pair, folder) for pair in pairs)


def _below(pair: Pair, folder: str) -> Pair:
    if not pair.media or pair.place is not None or remote_file.is_absolute(pair.media):
        return pair
    return dataclasses.replace(pair, media=posixpath.join(folder, pair.media))


def rejected_media(row: int, media: str, reason: str, detail: str) -> Pair:
    """Returns the rejected pair of a media file without usable captions."""
    return Pair(row=row, media=media, caption="", reason=reason, detail=detail)


def kept_json(values: Mapping[str, Any], names: Collection[str]) -> str | None:
    """Serializes the values of the kept columns to a JSON object; None if all are missing.

    A value without a JSON type, such as a date, is converted to text. NaN is a missing value;
    infinity is kept, as `Infinity`, which json.loads reads.
    """
    kept = {name: values[name] for name in names if not _is_absent(values.get(name))}
    return json.dumps(kept, ensure_ascii=False, default=str) if kept else None


def _is_absent(value: Any) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def wanted_columns(columns: Columns, keep_columns: Collection[str] = ()) -> dict[str, str]:
    """Returns {required column: config key that specifies it}."""
    return dict.fromkeys(keep_columns, "keep_columns") | columns.keys_of_columns()


def check_columns(
    path: str, found: Collection[str], *, wanted: Mapping[str, str], advice: str = ""
) -> None:
    """Checks that a table has all wanted columns.

    Args:
        path: path of the table.
        found: names of its columns.
        wanted: {required column: config key that specifies it}.
        advice: end of the message about a missing column.

    Raises:
        InputError: if a column is missing, or several have the same name.
    """
    found = list(found)
    if len(set(found)) != len(found):
        repeated = sorted({name for name in found if found.count(name) > 1})
        raise InputError(f"{path}: duplicate columns: {', '.join(repeated)}")
    for column, key in wanted.items():
        if column not in found:
            nearest = difflib.get_close_matches(column, found, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InputError(
                f"{path}: expected a column {column!r} ({key}), found "
                f"{', '.join(found) or 'no columns'}{hint}{advice}"
            )


# ------------------------------------------------------------------- sidecars and .json members


def pairs_of_sidecar(
    columns: Columns,
    keep_columns: Collection[str],
    *,
    row: int,
    media: str,
    place: str | None,
    json_bytes: bytes | None,
    txt_bytes: bytes | None,
    caption_source: CaptionSource,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Pair]:
    """Yields the pairs of one media file with captions in a .json or a .txt.

    Pairs are tagged CAPTION_DIFFERS if both files hold captions that contradict each other.

    Args:
        columns: keys of the caption, class_name and uid in the .json; None for default keys.
        keep_columns: additional keys to keep.
        row: number in the input, from 1.
        media: path, or the file that holds the bytes.
        place: location of the bytes in `media`.
        json_bytes: content of the .json file; None if there is none.
        txt_bytes: content of the .txt file; None if there is none.
        caption_source: file whose caption is taken if both have one.
        defaults: values for keys that are missing from the .json.
    """
    try:
        found = json_object_of(json_bytes) if json_bytes is not None else {}
    except (ValueError, RecursionError) as error:
        yield rejected_media(row, media, "not_json", f".json: {error}")
        return
    values = {**defaults, **found}
    keys = CAPTION_KEYS
    if columns.caption != Columns().caption:
        keys = (columns.caption,)
    in_json = captions_in_json(values, keys)
    in_txt = None
    if txt_bytes is not None:
        in_txt = txt_bytes.decode("utf-8-sig", errors="surrogateescape")
    has_txt = in_txt is not None and bool(in_txt.strip())
    prefers_txt = in_json is None or (caption_source == "txt" and has_txt)
    captions = in_txt if prefers_txt else in_json
    if captions is None:
        detail = f"expected {' or '.join(keys)} in a .json file, or a .txt file next to the media"
        yield rejected_media(row, media, "missing_caption", detail)
        return
    marks = (CAPTION_DIFFERS,) if captions_differ(in_json, in_txt) else ()
    for pair in pairs_of_row(
        row=row,
        media=media,
        place=place,
        captions=captions,
        class_name=values.get(columns.class_name or "class_name"),
        uid=values.get(columns.uid or "uid"),
        kept=kept_json(values, keep_columns),
        is_file_name=True,
    ):
        yield dataclasses.replace(pair, marks=marks) if marks else pair


def json_object_of(content: bytes) -> dict[str, Any]:
    """Parses a .json; bytes that are not UTF-8 become lone surrogates.

    Raises:
        ValueError: if the content is not JSON, or not an object.
    """
    values = json.loads(content.decode("utf-8-sig", errors="surrogateescape"))
    if not isinstance(values, dict):
        raise ValueError(f"expected an object, found {type(values).__name__}")
    return values
