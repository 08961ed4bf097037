"""Reads pairs from folders: media with captions in files beside them, or one folder per class."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial

from data_prep.config import MakeShards
from data_prep.errors import InputError
from data_prep.sources.input_files import MEDIA_SUFFIXES, readable_input
from data_prep.sources.item_file import read_item_file
from data_prep.sources.pair import BadItemError, Pair
from data_prep.sources.rows import (
    MAX_SIDECAR_BYTES,
    pairs_of_row,
    pairs_of_sidecar,
    rejected_media,
)
from data_prep.storage import remote_file
from data_prep.workers import map_ahead

SIDECAR_SUFFIXES = (".json", ".txt")
REMOTE_SIDECARS_AHEAD = 32


def read_folder(config: MakeShards) -> Iterator[Pair]:
    """The pairs of all media in a folder, each with a .json or .txt of the same name beside it.

    Media of other kinds, and other files, are left out unless a caption stands beside them.

    Raises:
        InputError: the input is no folder, or a sidecar cannot be read.
    """
    names = _sorted_names(config)
    found = ((name, _sidecars_of(name, names)) for name in names if not _is_sidecar(name))
    media = (
        (name, sidecars)
        for name, sidecars in found
        if sidecars or remote_file.suffix_of(name) in MEDIA_SUFFIXES[config.media]
    )
    read = partial(_read_sidecars, config.input)
    ahead = REMOTE_SIDECARS_AHEAD if remote_file.local_path(config.input) is None else 1
    for row, (name, contents) in enumerate(map_ahead(read, media, ahead=ahead), 1):
        if isinstance(contents, BadItemError):
            yield rejected_media(row, name, "unreadable_caption", contents.detail)
            continue
        yield from pairs_of_sidecar(
            config,
            row=row,
            media=name,
            place=None,
            json_bytes=contents.get(".json"),
            txt_bytes=contents.get(".txt"),
        )


def _sorted_names(config: MakeShards) -> list[str]:
    with readable_input(config.input):
        if not remote_file.is_folder(config.input):
            raise InputError(
                f"{config.input}: format={config.format}: expected a folder (input), found none"
            )
        return sorted(file.name for file in remote_file.list_files(config.input))


def _is_sidecar(name: str) -> bool:
    return name.endswith(SIDECAR_SUFFIXES)


def _sidecars_of(name: str, names: Sequence[str]) -> list[str]:
    stem = name[: len(name) - len(remote_file.suffix_of(name))]
    return [stem + suffix for suffix in SIDECAR_SUFFIXES if _holds(names, stem + suffix)]


def _holds(names: Sequence[str], name: str) -> bool:
    place = bisect_left(names, name)
    return place < len(names) and names[place] == name


def _read_sidecars(
    folder: str, media: tuple[str, list[str]]
) -> tuple[str, dict[str, bytes] | BadItemError]:
    name, sidecars = media
    contents: dict[str, bytes] = {}
    try:
        for sidecar in sidecars:
            path = remote_file.join(folder, sidecar)
            content = read_item_file(path, max_bytes=MAX_SIDECAR_BYTES)
            contents[remote_file.suffix_of(sidecar)] = content
    except BadItemError as error:
        return name, error
    return name, contents


# ------------------------------------------------------------------------------- class folders


def read_class_folders(config: MakeShards) -> Iterator[Pair]:
    """The pairs of a folder that holds one folder of media per class.

    The class is the name of the first folder below the input; its caption comes from
    caption_template.

    Raises:
        InputError: the input is no folder, or the template has no place for the class.
    """
    if "{}" not in config.caption_template:
        raise InputError(
            f"caption_template: expected a text with {{}} where the class's name belongs, found "
            f"{config.caption_template!r}"
        )
    row = 0
    for name in _sorted_names(config):
        if remote_file.suffix_of(name) not in MEDIA_SUFFIXES[config.media]:
            continue
        row += 1
        class_name, slash, _ = name.partition("/")
        if not slash:
            detail = "expected it in the folder of a class"
            yield rejected_media(row, name, "no_class_folder", detail)
            continue
        caption = config.caption_template.replace("{}", class_name)
        yield from pairs_of_row(
            row=row, media=name, captions=caption, class_name=class_name, is_file_name=True
        )
