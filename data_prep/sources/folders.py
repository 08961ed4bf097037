"""Pairs from folders: media with caption files next to them, or one folder per class."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from functools import partial

from data_prep.errors import InputError
from data_prep.shards.sample import split_member_name
from data_prep.sources.input_files import MEDIA_SUFFIXES, PairSource, readable_input
from data_prep.sources.item_file import read_item_file
from data_prep.sources.pair import BadItemError, FileRef, Pair
from data_prep.sources.rows import (
    MAX_SIDECAR_BYTES,
    pairs_of_row,
    pairs_of_sidecar,
    rejected_media,
)
from data_prep.sources.sample_rows import SampleMembers, SampleRows, pair_of_members
from data_prep.storage import remote_file
from data_prep.workers import map_ahead

SIDECAR_SUFFIXES = (".json", ".txt")
REMOTE_SIDECARS_AHEAD = 32


def read_folder(source: PairSource) -> Iterator[Pair]:
    """Yields the pairs of all media in a folder, each with a .json or .txt of the same name.

    Files without a sidecar are skipped unless their extension is one of the configured kind of
    media.

    Raises:
        InputError: if the input is not a folder, or a sidecar cannot be read.
    """
    names = _sorted_names(source)
    if source.media is None:
        yield from _samples(source, names)
        return
    found = ((name, _sidecars_of(name, names)) for name in names if not _is_sidecar(name))
    media = (
        (name, sidecars)
        for name, sidecars in found
        if sidecars or remote_file.suffix_of(name) in MEDIA_SUFFIXES[source.media]
    )
    read = partial(_read_sidecars, source.input)
    ahead = REMOTE_SIDECARS_AHEAD if remote_file.local_path(source.input) is None else 1
    for row, (name, contents) in enumerate(map_ahead(read, media, ahead=ahead), 1):
        if isinstance(contents, BadItemError):
            yield rejected_media(row, name, "unreadable_caption", contents.detail)
            continue
        yield from pairs_of_sidecar(
            source.columns,
            source.keep_columns,
            row=row,
            media=name,
            place=None,
            json_bytes=contents.get(".json"),
            txt_bytes=contents.get(".txt"),
            caption_source=source.caption_source,
        )


def _samples(source: PairSource, names: Sequence[str]) -> Iterator[Pair]:
    """Yields the samples of a folder; the files of a sample have the same name up to a dot."""
    samples = SampleRows(source)
    files: dict[str, dict[str, str]] = {}
    for name in names:
        key, extension = split_member_name(name)
        if extension and not key.endswith("/") and key:
            files.setdefault(key, {})[extension] = name

    def read(name: str) -> bytes:
        return read_item_file(remote_file.join(source.input, name), max_bytes=MAX_SIDECAR_BYTES)

    for row, extensions in enumerate(files.values(), 1):
        yield pair_of_members(samples, row, SampleMembers(extensions, ref=FileRef, read=read))


def _sorted_names(source: PairSource) -> list[str]:
    with readable_input(source.input):
        if not remote_file.is_folder(source.input):
            raise InputError(
                f"{source.input}: format={source.format}: expected a folder (input), found none"
            )
        return sorted(file.name for file in remote_file.list_files(source.input))


def _is_sidecar(name: str) -> bool:
    return name.endswith(SIDECAR_SUFFIXES)


def _sidecars_of(name: str, names: Sequence[str]) -> list[str]:
    stem = name[: len(name) - len(remote_file.suffix_of(name))]
    return [stem + suffix for suffix in SIDECAR_SUFFIXES if _holds(names, stem + suffix)]


def _holds(names: Sequence[str], name: str) -> bool:
    index = bisect_left(names, name)
    return index < len(names) and names[index] == name


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


def read_class_folders(source: PairSource) -> Iterator[Pair]:
    """Yields the pairs of a folder that holds one folder of media per class.

    The class is the name of the first folder below the input. `underscores` decides if `_` becomes
    a space; `caption_template` defines the caption.

    Raises:
        InputError: if the input is not a folder, or the template has no {} for the class name.
    """
    if "{}" not in source.caption_template:
        raise InputError(
            "caption_template: expected text with {} in place of the class name, found "
            f"{source.caption_template!r}"
        )
    row = 0
    for name in _sorted_names(source):
        if remote_file.suffix_of(name) not in MEDIA_SUFFIXES[source.media]:
            continue
        row += 1
        class_name, slash, _ = name.partition("/")
        if not slash:
            detail = "expected the file in a class folder"
            yield rejected_media(row, name, "no_class_folder", detail)
            continue
        if source.underscores == "spaces":
            class_name = " ".join(class_name.replace("_", " ").split())
        caption = source.caption_template.replace("{}", class_name)
        yield from pairs_of_row(
            row=row, media=name, captions=caption, class_name=class_name, is_file_name=True
        )
