"""Reads pairs of media path and caption from a manifest or a folder, and groups them into items.

input file or folder -> read_pairs: one Pair per caption, in order
                     -> read_items: one Item per sample to be, the unit that shards own
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.config import Columns, MakeShards
from data_prep.config_file import InputError
from data_prep.pair import Pair, checked_pair, extension_of, unreadable_row
from data_prep.shard_format import media_kind_of

MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl")
SIDECAR_SUFFIXES = (".json", ".txt")  # the first that exists holds the captions
CAPTION_KEYS = ("captions", "caption", "text")


@dataclass(frozen=True, slots=True)
class Item:
    """What becomes one sample: a media file and its captions."""

    number: int  # from 0, over the whole input; the sample's key
    media: str
    pairs: list[Pair]


@dataclass(frozen=True)
class Items:
    """All items of an input."""

    items: list[Item]
    num_pairs: int
    sha256: str  # over the pairs: a changed input is noticed


def media_root_of(config: MakeShards) -> Path:
    """The folder from which relative media paths start."""
    if config.media_root is not None:
        return config.media_root
    return config.input if config.input.is_dir() else config.input.parent


def read_items(config: MakeShards) -> Items:
    """The items of the input, in order of first appearance.

    Raises:
        InputError: the input is missing, is not readable, has not the configured columns, or
            holds no pair.
    """
    digest = hashlib.sha256()
    items: list[Item] = []
    item_of_media: dict[str, Item] = {}
    num_pairs = 0
    for pair in read_pairs(config):
        num_pairs += 1
        digest.update(f"{_fields_of(pair)}\n".encode("utf-8", errors="surrogateescape"))
        can_group = config.captions_per_item == "group" and pair.media
        item = item_of_media.get(pair.media) if can_group else None
        if item is None:
            item = Item(number=len(items), media=pair.media, pairs=[])
            items.append(item)
            if can_group:
                item_of_media[pair.media] = item
        item.pairs.append(_check_class_name(pair, item))
    if not items:
        raise InputError(f"{config.input}: expected pairs of media and caption, found none")
    return Items(items=items, num_pairs=num_pairs, sha256=digest.hexdigest())


def _fields_of(pair: Pair) -> tuple:
    return (pair.row, pair.media, pair.caption, pair.class_name, pair.uid, pair.reason)


def _check_class_name(pair: Pair, item: Item) -> Pair:
    first = next((other for other in item.pairs if other.reason is None), pair)
    if pair.reason is None and pair.class_name != first.class_name:
        return Pair(
            row=pair.row,
            media=pair.media,
            caption=pair.caption,
            reason="conflicting_class_name",
            detail=f"row {first.row} says {first.class_name!r}, this one {pair.class_name!r}",
        )
    return pair


def read_pairs(config: MakeShards) -> Iterator[Pair]:
    """The pairs of the input, streamed; unusable ones carry their reason.

    Raises:
        InputError: as read_items.
    """
    if config.input.is_dir():
        yield from _read_folder(config)
        return
    if not config.input.exists():
        raise InputError(f"{config.input}: expected a manifest or a folder (input), found nothing")
    suffix = config.input.suffix.lower()
    if suffix not in MANIFEST_SUFFIXES:
        raise InputError(
            f"{config.input}: expected one of {' '.join(MANIFEST_SUFFIXES)} or a folder (input), "
            f"found {suffix or 'no extension'}"
        )
    yield from _read_jsonl(config) if suffix == ".jsonl" else _read_table(config, suffix)


# ----------------------------------------------------------------------------------- manifests


def _read_table(config: MakeShards, suffix: str) -> Iterator[Pair]:
    quotes = config.quotes if config.quotes is not None else suffix == ".csv"
    with _open_text(config.input, newline="") as file:
        reader = csv.reader(
            file,
            delimiter="," if suffix == ".csv" else "\t",
            quoting=csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE,
            strict=True,
        )
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_columns(config, header)
            place = {name: header.index(name) for name in header}
            for fields in reader:
                if fields:
                    yield _table_pair(config, fields, row=reader.line_num, place=place)
        except csv.Error as error:
            raise InputError(
                f"{config.input}: line {reader.line_num}: {error}; if quotation marks in the "
                "captions are just text, set quotes=false"
            ) from None


def _table_pair(config: MakeShards, fields: list[str], *, row: int, place: dict[str, int]) -> Pair:
    if len(fields) != len(place):
        detail = f"expected {len(place)} columns, found {len(fields)}"
        return unreadable_row(row, "wrong_column_count", detail)
    texts = {role: fields[place[column]] for role, column in config.columns if column is not None}
    return checked_pair(config.media, row=row, **texts)


def _read_jsonl(config: MakeShards) -> Iterator[Pair]:
    found: dict[str, None] = {}
    with _open_text(config.input) as file:
        for row, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                yield unreadable_row(row, "not_json", str(error))
                continue
            if not isinstance(values, dict):
                yield unreadable_row(row, "not_json", f"expected an object, found {line[:40]!r}")
                continue
            found |= dict.fromkeys(values)
            texts = {role: values.get(column) for role, column in config.columns if column}
            yield from _pairs_of_captions(config, row=row, texts=texts)
    if found:
        _check_columns(config, list(found))


def _pairs_of_captions(config: MakeShards, *, row: int, texts: dict[str, Any]) -> Iterator[Pair]:
    captions = texts.pop("caption")
    if not isinstance(captions, list):
        captions = [captions]
    for caption in captions or [None]:
        yield checked_pair(config.media, row=row, caption=caption, **texts)


def _check_columns(config: MakeShards, found: list[str]) -> None:
    if len(set(found)) != len(found):
        repeated = sorted({name for name in found if found.count(name) > 1})
        raise InputError(f"{config.input}: these columns stand twice: {', '.join(repeated)}")
    for role, column in config.columns:
        if column is not None and column not in found:
            nearest = difflib.get_close_matches(column, found, n=1, cutoff=0.5)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise InputError(
                f"{config.input}: expected a column {column!r} (columns.{role}), found "
                f"{', '.join(found) or 'no columns'}{hint}"
            )


@contextmanager
def _open_text(path: Path, *, newline: str | None = None) -> Iterator[Any]:
    """Bytes that are not UTF-8 come through as lone surrogates, and are rejected row by row."""
    try:
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: not readable: {error.strerror}") from None


# -------------------------------------------------------------------------------------- folder


def _read_folder(config: MakeShards) -> Iterator[Pair]:
    if config.columns != Columns() or config.media_root is not None:
        raise InputError(
            f"{config.input}: columns={config.columns.model_dump()} and media_root="
            f"{config.media_root} have no meaning when the input is a folder; add "
            "columns={} media_root=null"
        )
    paths = sorted(
        (path for path in config.input.rglob("*") if path.is_file() and path.name[0] != "."),
        key=lambda path: path.relative_to(config.input).as_posix(),
    )
    known = set(paths)
    row = 0
    for path in paths:
        if path.suffix.lower() in SIDECAR_SUFFIXES:
            continue
        sidecar = next(
            (path.with_suffix(s) for s in SIDECAR_SUFFIXES if path.with_suffix(s) in known), None
        )
        if sidecar is None and media_kind_of(extension_of(path.name)) != config.media:
            continue
        row += 1
        media = path.relative_to(config.input).as_posix()
        yield from _sidecar_pairs(config, row=row, media=media, sidecar=sidecar)


def _sidecar_pairs(
    config: MakeShards, *, row: int, media: str, sidecar: Path | None
) -> Iterator[Pair]:
    if sidecar is None:
        detail = f"expected {' or '.join(SIDECAR_SUFFIXES)} beside it"
        yield Pair(row=row, media=media, caption="", reason="missing_caption", detail=detail)
        return
    text = sidecar.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    if sidecar.suffix == ".txt":
        yield checked_pair(config.media, row=row, media=media, caption=text)
        return
    try:
        values = json.loads(text)
        captions = next((values[key] for key in CAPTION_KEYS if values.get(key)), None)
    except (ValueError, AttributeError) as error:
        detail = f"{sidecar.name}: {error}"
        yield Pair(row=row, media=media, caption="", reason="not_json", detail=detail)
        return
    texts = {key: values.get(key) for key in ("class_name", "uid")}
    yield from _pairs_of_captions(
        config, row=row, texts={"media": media, "caption": captions, **texts}
    )
