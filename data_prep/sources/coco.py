"""Pairs from COCO captions: a JSON file with a list of images and a list of annotations."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from data_prep.config import Columns
from data_prep.errors import InputError
from data_prep.sources.input_files import PairSource, files_of_input, readable_input
from data_prep.sources.pair import Pair, unreadable_row
from data_prep.sources.rows import kept_json, pairs_of_row, rejected_media
from data_prep.storage import remote_file

FILE_NAME = "file_name"


def read_coco(source: PairSource) -> Iterator[Pair]:
    """Yields the captions of every image, in the order of images in the file.

    The row of a pair is the number of its image. In `source.columns`, media, class_name and uid are
    keys of an image, such as coco_url and id; caption is a key of an annotation.

    Raises:
        InputError: if a file is unreadable, or does not contain COCO captions.
    """
    files = files_of_input(source.input, "coco")
    first_row = 0
    for name in files.names:
        images, annotations = _read_lists(files.path_of(name))
        yield from _pairs(
            images,
            annotations,
            columns=source.columns,
            keep_columns=source.keep_columns,
            first_row=first_row,
        )
        first_row += len(images)


def _read_lists(path: str) -> tuple[list[Any], list[Any]]:
    with readable_input(path):
        content = remote_file.read_bytes(path)
    try:
        values = json.loads(content.decode("utf-8-sig", errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected COCO captions in JSON: {error}") from None
    lists = [
        values.get(key) if isinstance(values, dict) else None for key in ("images", "annotations")
    ]
    if not all(isinstance(entries, list) for entries in lists):
        found = ", ".join(map(str, values)) if isinstance(values, dict) else type(values).__name__
        raise InputError(
            f"{path}: expected COCO captions, an object with lists `images` and `annotations`, "
            f"found {found[:200] or 'an empty object'}"
        )
    return lists[0], lists[1]


def _pairs(
    images: list[Any],
    annotations: list[Any],
    *,
    columns: Columns,
    keep_columns: tuple[str, ...],
    first_row: int,
) -> Iterator[Pair]:
    media_key = FILE_NAME if columns.media == Columns().media else columns.media
    captions: dict[Any, list[Any]] = defaultdict(list)
    for annotation in annotations:
        if isinstance(annotation, dict):
            captions[str(annotation.get("image_id"))].append(annotation.get(columns.caption))
    for row, image in enumerate(images, first_row + 1):
        if not isinstance(image, dict) or "id" not in image:
            yield unreadable_row(
                row, "not_json", f"expected an image with an id, found {image!r:.80}"
            )
            continue
        found = captions.pop(str(image["id"]), None)
        if found is None:
            media = str(image.get(media_key) or "")
            yield rejected_media(row, media, "missing_caption", "the image has no annotation")
            continue
        yield from pairs_of_row(
            row=row,
            media=image.get(media_key),
            captions=found,
            class_name=image.get(columns.class_name) if columns.class_name else None,
            uid=image.get(columns.uid) if columns.uid else None,
            kept=kept_json(image, keep_columns),
        )
    for image_id, orphans in captions.items():
        for _ in orphans:
            detail = f"no image has the id {image_id}"
            yield unreadable_row(first_row + len(images), "unknown_image", detail)
