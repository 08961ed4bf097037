"""Rows that are samples of modalities: from the cells of a row to a `Pair` with parts.

A cell of an image or audio clip is a path or a FileRef to bytes in a container. A cell of a vector
is a number, a list of numbers, a path of an .npy file, or a FileRef. An empty cell means that the
sample lacks the modality. Files are read later, when their shard is written.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from data_prep.config import NamedColumn
from data_prep.modalities.vectors import VectorError, to_vector
from data_prep.shards.sample import (
    CAPTION_DIFFERS,
    CAPTION_KEYS,
    captions_differ,
    captions_in_json,
)
from data_prep.sources.input_files import MEDIA_SUFFIXES, PairSource
from data_prep.sources.pair import (
    BadItemError,
    BadModalityError,
    FileRef,
    Pair,
    SampleParts,
    text_of,
)
from data_prep.sources.rows import json_object_of, kept_json
from data_prep.storage import remote_file


class SampleRows:
    """Builder of the pairs of an input whose rows are samples of modalities.

    Args:
        source: input and its settings.
        folder: folder of the manifest, which precedes relative paths; "": none.
    """

    def __init__(self, source: PairSource, *, folder: str = ""):
        self.source = source
        self.folder = folder
        self.columns = source.columns.by_modality()

    def pair(
        self,
        row: int,
        cell: Callable[[str], Any],
        *,
        modalities: Mapping[str, Any] | None = None,
        marks: Sequence[str] = (),
    ) -> Pair:
        """Builds the pair of one row; the reason of an unusable row is set.

        Args:
            row: line or number in the input, from 1.
            cell: returns the value in a column; None if the row lacks it.
            modalities: value of each modality that is not in its column; None: all are.
            marks: tags of the sample.
        """
        parts, found_marks = SampleParts(), list(marks)
        columns = self.source.columns
        pair = Pair(row=row, media="", caption="")
        try:
            # Files and members have default keys, as those of pairs.
            defaults = (None, None) if modalities is None else ("uid", "class_name")
            keys = (columns.uid or defaults[0], columns.class_name or defaults[1])
            uid, class_name = (_text(cell(key), key) if key else None for key in keys)
            parts.labels.update(self._labels(cell))
            kept = {name: cell(name) for name in self.source.keep_columns}
            pair = replace(
                pair, uid=uid or None, class_name=class_name or None, kept=kept_json(kept, kept)
            )
            _check_characters(pair.kept or "", name="keep_columns")
            for name, column in self.columns.items():
                try:
                    self._add(parts, name, column, cell, modalities)
                except BadModalityError:
                    if self.source.bad_modality == "reject":
                        raise
                    found_marks.append(f"bad_{name}")
        except BadItemError as error:
            failed = getattr(error, "modality", None)
            failed = failed if failed in self.columns else None  # for example the uid
            return replace(
                pair, kept=None, reason=error.reason, detail=error.detail, modality=failed
            )
        first = next(iter(parts.files.values()), FileRef(""))
        pair = replace(
            pair,
            media=first.media,
            place=first.place,
            parts=parts.to_json(),
            marks=tuple(found_marks),
        )
        return checked_count(pair, len(parts), least=self.source.min_modalities)

    def _labels(self, cell: Callable[[str], Any]) -> dict[str, Any]:
        found = {name: cell(column) for name, column in self.source.columns.labels.items()}
        for name, value in found.items():
            if not isinstance(value, str | int | float | bool | None):
                raise BadItemError("not_a_label", f"{name}: expected text or a number")
            if isinstance(value, str):
                _check_characters(value, name=name)
        return {name: value for name, value in found.items() if not _is_missing(value)}

    def _add(
        self,
        parts: SampleParts,
        name: str,
        column: NamedColumn,
        cell: Callable[[str], Any],
        modalities: Mapping[str, Any] | None,
    ) -> None:
        if not isinstance(column.column, str):
            vector = _vector_of_cells(name, {each: cell(each) for each in column.column})
            if vector is not None:
                parts.vectors[name] = vector
            return
        value = cell(column.column) if modalities is None else modalities.get(name)
        if _is_missing(value):
            return
        if isinstance(value, FileRef):
            parts.files[name] = value
        elif column.kind == "text":
            if texts := _texts(name, value):
                parts.texts[name] = texts
        elif column.kind == "vector" and (numbers := _numbers(value)) is not None:
            parts.vectors[name] = _checked_vector(name, numbers)
        else:
            parts.files[name] = FileRef(self._path(name, value))

    def _path(self, name: str, value: Any) -> str:
        path = _text(value, name)
        if not remote_file.is_absolute(path):
            if ".." in path and remote_file.points_outside(path):
                detail = f"{path}: points outside media_root"
                raise BadModalityError(name, "path_outside_root", detail)
            if self.folder:
                return f"{self.folder}/{path}"
        return path


def sample_rows(source: PairSource, name: str) -> SampleRows:
    """Returns the builder for one manifest.

    Args:
        source: input and its settings.
        name: name of the manifest, relative to the input's folder.
    """
    folder = "" if source.media_root is not None else posixpath.dirname(name)
    return SampleRows(source, folder=folder)


def checked_count(pair: Pair, num_modalities: int, *, least: int) -> Pair:
    """Returns the pair; rejected if the sample has fewer modalities than `min_modalities`."""
    if pair.reason is None and num_modalities < least:
        detail = f"expected at least {least} (min_modalities), found {num_modalities}"
        return replace(pair, reason="too_few_modalities", detail=detail)
    return pair


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or (isinstance(value, list) and not value)


def _text(value: Any, name: str) -> str:
    if isinstance(value, dict | list | bool):
        raise BadModalityError(name, "not_text", f"expected text, found {str(value)!r:.80}")
    text = text_of(value).strip()
    _check_characters(text, name=name)
    return text


def _check_characters(text: str, *, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        detail = f"{error.reason} at character {error.start}"
        raise BadModalityError(name, "not_utf8", detail) from None
    if "\0" in text:
        detail = f"character {text.index(chr(0))} is NUL"
        raise BadModalityError(name, "nul_character", detail)


def _texts(name: str, value: Any) -> list[str]:
    listed = value if isinstance(value, list) else [value]
    return [text for each in listed if (text := _text(each, name))]


def _numbers(value: Any) -> Any:
    """Returns a number or list as a list; None for text that is a path."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list):
        return value
    return [value] if isinstance(value, int | float) else None


def _vector_of_cells(name: str, cells: Mapping[str, Any]) -> list[float] | None:
    """Returns the numbers of several columns; None if all are missing."""
    missing = [column for column, value in cells.items() if _is_missing(value)]
    if len(missing) == len(cells):
        return None
    if missing:
        detail = f"no number in {', '.join(missing)}, but in other columns of this vector"
        raise BadModalityError(name, "vector_incomplete", detail)
    try:
        numbers = [float(value) for value in cells.values()]
    except (ValueError, TypeError, OverflowError) as error:
        raise BadModalityError(name, "not_numbers", str(error)) from None
    return _checked_vector(name, numbers)


def _checked_vector(name: str, numbers: list[Any]) -> list[Any]:
    try:
        return to_vector(numbers).tolist()
    except VectorError as error:
        raise BadModalityError(name, error.reason, str(error)) from None


# ---------------------------------------------------------------------------- files and members


@dataclass(frozen=True)
class SampleMembers:
    """The files of one sample in a folder, or its members in a tar: extension -> location."""

    extensions: Mapping[str, Any]
    ref: Callable[[Any], FileRef]  # location -> reference
    read: Callable[[Any], bytes]  # location -> content; raises BadItemError
    columns: Mapping[str, Any] = field(default_factory=dict)  # of a Parquet file


def pair_of_members(samples: SampleRows, row: int, members: SampleMembers) -> Pair:
    """Builds the pair of the files or members of one sample.

    The column of an image, clip or vector is the name of its members; a text is in the `.json` or
    in a `.txt`.

    Args:
        samples: builder of pairs.
        row: number of the sample in the input, from 1.
        members: files or members of the sample.
    """
    pair = Pair(row=row, media="", caption="")
    try:
        metadata = _metadata(members)
        values = {**members.columns, **metadata}
        nested = metadata.get("labels")
        values = {**(nested if isinstance(nested, dict) else {}), **values}
        found, marks = {}, []
        for name, each in samples.columns.items():
            if not isinstance(each.column, str):
                continue
            if each.kind == "text":
                found[name], differs = _text_of_members(samples.source, name, values, members)
                marks += [CAPTION_DIFFERS] if differs else []
            else:
                found[name] = _file_of_members(each, members)
                if found[name] is None and each.kind == "vector":
                    found[name] = values.get(each.column)
    except BadItemError as error:
        return replace(pair, reason=error.reason, detail=error.detail)
    return samples.pair(row, values.get, modalities=found, marks=list(dict.fromkeys(marks)))


def _metadata(members: SampleMembers) -> dict[str, Any]:
    if "json" not in members.extensions:
        return {}
    content = members.read(members.extensions["json"])
    try:
        return json_object_of(content)
    except (ValueError, RecursionError) as error:
        raise BadItemError("not_json", f".json: {error}") from None


def _file_of_members(column: NamedColumn, members: SampleMembers) -> FileRef | None:
    prefix = "" if column.column == column.kind else f"{column.column}."
    suffixes = MEDIA_SUFFIXES.get(column.kind, (".npy",))
    names = (name for name in sorted(members.extensions) if name.startswith(prefix))
    found = next((name for name in names if f".{name.removeprefix(prefix)}" in suffixes), None)
    return None if found is None else members.ref(members.extensions[found])


def _text_of_members(
    source: PairSource, name: str, values: Mapping[str, Any], members: SampleMembers
) -> tuple[Any, bool]:
    """Returns (text or texts, whether the .json and the .txt contradict each other)."""
    columns = source.columns.by_modality()
    column = str(columns[name].column)
    keys: Sequence[str] = (column,)
    txt = f"{column}.txt"
    if name == "text":
        others = {each.column for other, each in columns.items() if other != name}
        keys = [key for key in CAPTION_KEYS if key not in others] if column == name else keys
        txt = "txt"
    in_json, in_txt = captions_in_json(values, keys), None
    if txt in members.extensions:
        content = members.read(members.extensions[txt])
        in_txt = content.decode("utf-8-sig", errors="surrogateescape")
    has_txt = in_txt is not None and bool(in_txt.strip())
    prefers_txt = in_json is None or (source.caption_source == "txt" and has_txt)
    return (in_txt if prefers_txt else in_json), captions_differ(in_json, in_txt)
