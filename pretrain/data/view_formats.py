"""Formats of views: how the content of a sample becomes a row of a batch, per kind of modality.

    open     content of the sample -> what the view shows of it, still encoded; None if absent
    decode   -> a random crop or part (images and clips); anything else as it is
    write    -> the row

Each view has its own random numbers (see pretrain.sampling.keyed_random.sample_random).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from data_prep.errors import InputError
from data_prep.media.decode import MediaError
from data_prep.modalities.modality import Kind, Modality
from data_prep.shards.sample_contents import SampleContents
from pretrain.data.batch import ViewBatch, ViewLayout
from pretrain.data.transforms import MediaTransform
from pretrain.model.tokenizer import Tokenizer, token_keys
from pretrain.sampling.keyed_random import SampleRandom
from pretrain.settings.model import Model, VectorModality
from pretrain.settings.views import View


class ViewFormat(Protocol):
    """Format of one view."""

    view: View
    kind: Kind
    layout: ViewLayout

    def check(self, modality: Modality, where: str) -> None:
        """Checks that a modality of a dataset fits.

        Raises:
            InputError: if it has another kind or shape.
        """

    def open(self, contents: SampleContents, rng: SampleRandom) -> Any | None:
        """Returns what the view shows of a sample; None if the sample lacks the modality."""

    def decode(self, opened: Any, rng: SampleRandom) -> Any:
        """Decodes what `open` returned.

        Raises:
            data_prep.media.decode.MediaError: if its bytes are damaged.
        """

    def write(self, part: Any, rng: SampleRandom, batch: ViewBatch, row: int) -> None:
        """Writes what `decode` returned into a row; texts are written by `write_texts`."""

    def exactly(self, contents: SampleContents) -> tuple[Tensor, ...] | None:
        """Returns the tower's inputs without anything random; None if the modality is absent.

        Raises:
            data_prep.media.decode.MediaError: if bytes are damaged.
        """


def refuse_other_kind(view: View, kind: Kind, modality: Modality, where: str) -> None:
    """Checks the kind of a dataset's modality.

    Raises:
        InputError: if it is another one than the view's.
    """
    if modality.kind != kind:
        raise InputError(
            f"{where}: expected {view.member!r} of kind {kind}, which the view {str(view)!r} "
            f"shows; found kind {modality.kind}"
        )


class MediaFormat:
    """Images and audio clips."""

    def __init__(self, view: View, kind: Kind, transform: MediaTransform) -> None:
        self.view = view
        self.kind: Kind = kind
        self.transform = transform
        self.layout = ViewLayout(transform.row_shape, transform.row_dtype, transform.num_masks)

    def check(self, modality: Modality, where: str) -> None:
        refuse_other_kind(self.view, self.kind, modality, where)

    def open(self, contents: SampleContents, rng: SampleRandom) -> tuple[bytes, str] | None:
        content = contents.media.get(self.view.member)
        return None if content is None else (content, contents.extensions[self.view.member])

    def decode(self, opened: tuple[bytes, str], rng: SampleRandom) -> np.ndarray:
        content, extension = opened
        try:
            return self.transform.decode_training(content, extension, rng)
        except MediaError as error:
            raise self._named(error, extension) from None

    def write(self, part: np.ndarray, rng: SampleRandom, batch: ViewBatch, row: int) -> None:
        masks = self.transform.write_row(part, rng, batch.values[row])
        if masks:
            batch.masks[row] = torch.tensor(masks, dtype=torch.int32)

    def exactly(self, contents: SampleContents) -> tuple[Tensor, ...] | None:
        content = contents.media.get(self.view.member)
        if content is None:
            return None
        extension = contents.extensions[self.view.member]
        try:
            return (self.transform(self.transform.decode(content, extension)),)
        except MediaError as error:
            raise self._named(error, extension) from None

    def _named(self, error: MediaError, extension: str) -> MediaError:
        member = self.view.member
        name = extension if member == self.kind else f"{member}.{extension}"
        return MediaError(f".{name}: {error}", reason=error.reason)


class TextFormat:
    """Texts; of several, a random one. Tokens are written for many rows at once."""

    kind: Kind = "text"

    def __init__(self, view: View, tokenizer: Tokenizer, *, has_lengths: bool) -> None:
        self.view = view
        self.tokenizer = tokenizer
        self.layout = ViewLayout((tokenizer.context_length,), torch.int64, has_lengths=has_lengths)

    def check(self, modality: Modality, where: str) -> None:
        refuse_other_kind(self.view, self.kind, modality, where)

    def open(self, contents: SampleContents, rng: SampleRandom) -> str | None:
        texts = contents.texts.get(self.view.member)
        return texts[rng.below(len(texts))] if texts else None

    def decode(self, opened: str, rng: SampleRandom) -> str:
        return opened

    def write(self, part: str, rng: SampleRandom, batch: ViewBatch, row: int) -> None:
        pass

    def write_texts(self, texts: Sequence[str | None], batch: ViewBatch, rows: range) -> None:
        """Writes the tokens of some rows, their lengths and their keys.

        Args:
            texts: text of each row; None for rows without one, which get the tokens of "".
            batch: rows of the view.
            rows: rows to write.
        """
        part = slice(rows.start, rows.stop)
        tokens = self.tokenizer([text or "" for text in texts])
        batch.values[part] = tokens
        if batch.lengths is not None:
            batch.lengths[part] = self.tokenizer.lengths(tokens)
        batch.keys[part] = token_keys(tokens)

    def exactly(self, contents: SampleContents) -> tuple[Tensor, ...] | None:
        texts = contents.texts.get(self.view.member)
        return (self.tokenizer(texts[:1])[0],) if texts else None


class VectorFormat:
    """Vectors, padded with zeros if their length differs."""

    kind: Kind = "vector"

    def __init__(self, view: View, config: VectorModality) -> None:
        self.view = view
        self.config = config
        self.is_sequence = config.max_rows is not None
        shape = (config.max_rows, config.width) if self.is_sequence else (config.width,)
        self.layout = ViewLayout(shape, torch.float32, has_num_rows=self.is_sequence)

    def check(self, modality: Modality, where: str) -> None:
        refuse_other_kind(self.view, self.kind, modality, where)
        found = (modality.width, modality.is_sequence)
        if found != (self.config.width, self.is_sequence):
            shapes = [
                f"[time, {width}] (max_rows set)" if is_sequence else f"[{width}] (max_rows null)"
                for width, is_sequence in ((self.config.width, self.is_sequence), found)
            ]
            raise InputError(
                f"{where}: expected vectors {self.view.member!r} of shape {shapes[0]}, found "
                f"{shapes[1]}; set width and max_rows of model.modalities.{self.view.modality}"
            )

    def open(self, contents: SampleContents, rng: SampleRandom) -> np.ndarray | None:
        return contents.vectors.get(self.view.member)

    def decode(self, opened: np.ndarray, rng: SampleRandom) -> np.ndarray:
        return opened

    def write(self, part: np.ndarray, rng: SampleRandom, batch: ViewBatch, row: int) -> None:
        for target, value in zip((batch.values, batch.num_rows), self._row(part), strict=False):
            target[row] = value

    def exactly(self, contents: SampleContents) -> tuple[Tensor, ...] | None:
        vector = contents.vectors.get(self.view.member)
        return None if vector is None else self._row(vector)

    def _row(self, vector: np.ndarray) -> tuple[Tensor, ...]:
        if not self.is_sequence:
            return (torch.from_numpy(vector.copy()),)
        row = torch.zeros(self.layout.shape)
        kept = torch.from_numpy(vector[: self.config.max_rows].copy())
        row[: len(kept)] = kept
        return row, torch.tensor(len(kept))


def build_formats(
    views: Sequence[str],
    model: Model,
    *,
    transforms: Mapping[str, MediaTransform],
    tokenizer: Tokenizer | None,
) -> dict[str, ViewFormat]:
    """Builds the formats of some views, by name.

    Args:
        views: names of the views, of modalities that the model has.
        model: config section `model`.
        transforms: transform of each kind of media.
        tokenizer: tokenizer of texts.
    """
    return {name: _build_format(View.parse(name), model, transforms, tokenizer) for name in views}


def _build_format(
    view: View,
    model: Model,
    transforms: Mapping[str, MediaTransform],
    tokenizer: Tokenizer | None,
) -> ViewFormat:
    kind = model.kinds[view.modality]
    if kind == "text":
        assert tokenizer is not None
        # By the lengths, tokens are trimmed; only the tower `text` is checked to allow it.
        return TextFormat(view, tokenizer, has_lengths=model.tower_of(view.modality) == "text")
    if kind == "vector":
        return VectorFormat(view, model.modalities[view.modality])
    return MediaFormat(view, kind, transforms[kind])
