"""Preparation of the modalities of one sample: files to read, media, vectors, texts.

1. read_files      reads the files of an item, in the order of its modalities
2. prepare_sample  decodes and prepares each image and clip, and checks each vector
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.config import AudioOptions, ImageOptions
from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.media.preparation import prepare_media
from data_prep.modalities.modality import Modalities, VectorShape
from data_prep.modalities.vectors import VectorError, from_npy, to_npy, to_vector
from data_prep.pipeline.media_reader import MediaReader
from data_prep.shards.parquet import with_prefix
from data_prep.shards.sample_contents import SampleContents
from data_prep.sources.pair import BadItemError, BadModalityError, Item, Pair, SampleParts

FileContents = dict[str, bytes | BadItemError]  # modality -> content or error of its file


@dataclass(frozen=True)
class PartSettings:
    """The settings for the modalities of a sample, named as in `MakeShards`."""

    modalities: Modalities
    image: ImageOptions
    audio: AudioOptions
    mark_only: tuple[str, ...]
    min_modalities: int
    bad_modality: str


@dataclass
class PreparedSample:
    """A sample that can be written."""

    contents: SampleContents
    members: dict[str, bytes] = field(default_factory=dict)
    measures: dict[str, Any] = field(default_factory=dict)  # columns of the Parquet file
    marks: set[str] = field(default_factory=set)


def read_files(
    items: Sequence[Item], reader: MediaReader, *, names: Collection[str] | None = None
) -> Iterator[tuple[Item, SampleParts, FileContents]]:
    """Yields each item with its parts and the contents of its files.

    Args:
        items: usable items; each has one pair, with parts.
        reader: reader of files and containers.
        names: modalities whose files are read; None: all.
    """
    parts = [SampleParts.from_json(item.pairs[0].parts or "") for item in items]
    wanted = [
        {name: ref for name, ref in each.files.items() if names is None or name in names}
        for each in parts
    ]
    files = [
        Item(item.number, ref.media, ref.place, [], column=ref.column)
        for item, refs in zip(items, wanted, strict=True)
        for ref in refs.values()
    ]
    contents = reader.read_all(files)
    for item, each, refs in zip(items, parts, wanted, strict=True):
        yield item, each, {name: next(contents)[1] for name in refs}


def find_shapes(items: Iterable[Item], modalities: Modalities, reader: MediaReader) -> Modalities:
    """Returns the modalities with the shape of each vector: that of its first usable value.

    Raises:
        InputError: if no item has a usable vector.
    """
    found: dict[str, VectorShape] = {}
    wanted = set(modalities.names_of("vector"))
    for item in items if wanted else ():
        if item.pairs[0].reason is None:
            found |= _shapes_in(item, wanted - set(found), reader)
        if len(found) == len(wanted):
            break
    missing = wanted - set(found)
    if missing:
        raise InputError(
            f"{reader.source.input}: {', '.join(sorted(missing))}: no row has a usable vector; "
            "check the column, or remove this modality"
        )
    return modalities.with_shapes(found)


def _shapes_in(item: Item, names: Collection[str], reader: MediaReader) -> dict[str, VectorShape]:
    found = {}
    for _, parts, files in read_files([item], reader, names=names):
        for name in names:
            try:
                vector = _vector(name, parts, files, shape=None)
            except BadModalityError:
                continue
            if vector is not None:
                found[name] = VectorShape.of(vector)
    return found


def prepare_sample(
    key: str, pair: Pair, parts: SampleParts, files: FileContents, settings: PartSettings
) -> PreparedSample:
    """Prepares all modalities of a sample.

    Raises:
        BadModalityError: if a modality cannot be used, unless it becomes absent, or a filter drops
            the sample.
        BadItemError: if too few modalities remain.
    """
    sample = PreparedSample(SampleContents("", key, texts=parts.texts, labels=parts.labels))
    sample.marks.update(pair.marks)
    for name, modality in settings.modalities.items():
        try:
            if modality.kind == "vector":
                _add_vector(sample, name, parts, files, settings)
            elif modality.kind != "text" and name in files:
                _add_media(sample, name, files[name], settings)
        except _FilteredError:
            raise
        except BadModalityError:
            if settings.bad_modality == "reject":
                raise
            sample.marks.add(f"bad_{name}")
    num_modalities = len(sample.contents.present)
    if num_modalities < settings.min_modalities:
        detail = f"expected at least {settings.min_modalities}, found {num_modalities}"
        raise BadItemError("too_few_modalities", detail)
    sample.members.update(_text_members(pair, sample.contents))
    return sample


class _FilteredError(BadModalityError):
    """A filter drops the sample."""


def _add_vector(
    sample: PreparedSample,
    name: str,
    parts: SampleParts,
    files: FileContents,
    settings: PartSettings,
) -> None:
    modality = settings.modalities[name]
    shape = VectorShape(modality.width or 0, is_sequence=modality.is_sequence)
    vector = _vector(name, parts, files, shape=shape)
    if vector is None:
        return
    sample.contents.vectors[name] = vector
    sample.members[settings.modalities.extensions_of(name)[0]] = to_npy(vector)
    length = vector.shape[0] if shape.is_sequence else 1
    sample.measures.update(with_prefix(name, {"length": length}))


def _vector(
    name: str, parts: SampleParts, files: FileContents, *, shape: VectorShape | None
) -> Any:
    """Returns the vector; None if the sample lacks it."""
    try:
        if name in parts.vectors:
            return to_vector(parts.vectors[name], shape=shape)
        if name in files:
            return from_npy(_content(name, files[name]), shape=shape)
    except VectorError as error:
        raise BadModalityError(name, error.reason, str(error)) from None
    return None


def _content(name: str, content: bytes | BadItemError) -> bytes:
    if isinstance(content, BadItemError):
        raise BadModalityError(name, content.reason, content.detail)
    return content


def _add_media(
    sample: PreparedSample, name: str, content: bytes | BadItemError, settings: PartSettings
) -> None:
    kind = settings.modalities[name].kind
    try:
        clips = prepare_media(
            _content(name, content), kind=kind, image=settings.image, audio=settings.audio
        )
    except MediaError as error:
        raise BadModalityError(name, error.reason, str(error)) from None
    assert len(clips) == 1, "long clips are not cut in samples of modalities"
    clip = clips[0]
    dropping = next((found for found in clip.found if found not in settings.mark_only), None)
    if dropping is not None:
        raise _FilteredError(name, dropping, "")
    prefix = "" if name == kind else f"{name}."
    sample.contents.media[name] = clip.content
    sample.contents.extensions[name] = clip.extension
    sample.members[prefix + clip.extension] = clip.content
    sample.measures.update(with_prefix(name, clip.measures))
    sample.marks.update(clip.found)


def _text_members(pair: Pair, contents: SampleContents) -> dict[str, bytes]:
    # A single plain text is stored as .txt; everything else needs a .json.
    texts = dict(contents.texts)
    plain = texts.pop("text", [])
    members = {"txt": plain[0].encode("utf-8")} if plain else {}
    values: dict[str, Any] = {"captions": plain} if plain else {}
    values |= {name: each if len(each) > 1 else each[0] for name, each in texts.items()}
    values |= {"class_name": pair.class_name} if pair.class_name else {}
    values |= {"uid": pair.uid} if pair.uid else {}
    values |= {"labels": contents.labels} if contents.labels else {}
    if values and (len(plain) > 1 or set(values) != {"captions"}):
        members["json"] = json.dumps(values, ensure_ascii=False).encode("utf-8")
    return members


def rejected_pair(pair: Pair, error: BadItemError) -> Pair:
    """Returns the pair with the reason and the modality of its rejection."""
    failed = getattr(error, "modality", None)
    return replace(pair, reason=error.reason, detail=error.detail, modality=failed)


def sources_of(parts: SampleParts) -> Mapping[str, str]:
    """Returns the path, URL or container of each file."""
    return {name: ref.media for name, ref in parts.files.items()}
