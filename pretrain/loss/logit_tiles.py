"""Strips of the N x N logits, a tile at a time: what is computed of them is never kept.

A tile is the logits of some media with some captions. The pairs themselves (its part of the main
diagonal) and duplicates that are no negatives are set apart, as minus infinity: formulas treat them
by themselves, which keeps a nearly perfect match from being lost in the rounding of large sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns of a tile, by device: two tiles are held, of at most 32 MiB each.
TILE_SHAPES = {"cpu": (512, 2048), "cuda": (2048, 4096)}


def accumulation_type(features: Tensor) -> torch.dtype:
    """The type of logits and sums: float64 for float64 features, float32 for all others."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Tile:
    """Logits of media `rows` with captions `columns`, numbered in the global batch."""

    rows: slice
    columns: slice
    logits: Tensor  # [rows, columns] of pairs that are negatives, minus infinity elsewhere
    spare: Tensor  # same shape, to be overwritten
    # Duplicates that are set apart: row and column in the tile, and their logits, each [duplicates]
    apart: tuple[Tensor, Tensor, Tensor] | None
    teacher_logits: Tensor | None  # [rows, columns]; minus infinity at masked duplicates

    def own_places(self) -> tuple[slice, slice] | None:
        """Which pairs have their own place in the tile, and where in its diagonal they lie.

        Returns:
            (pairs of the global batch, rows of the tile), or None.
        """
        first = max(self.rows.start, self.columns.start)
        stop = min(self.rows.stop, self.columns.stop)
        if first >= stop:
            return None
        return slice(first, stop), slice(first - self.rows.start, stop - self.rows.start)

    def diagonal(self, values: Tensor) -> Tensor:
        """The own places of a tensor of the tile's shape: a view of [pairs]."""
        first = max(self.rows.start, self.columns.start)
        stop = min(self.rows.stop, self.columns.stop)
        part = values[
            first - self.rows.start : stop - self.rows.start,
            first - self.columns.start : stop - self.columns.start,
        ]
        return part.diagonal()


@dataclass(frozen=True)
class Features:
    """Rows of one side, with their teacher's, and where they begin in the global batch."""

    first: int
    features: Tensor  # [rows, D], L2-normalised
    teacher: Tensor | None = None  # [rows, teacher's D], L2-normalised

    def __len__(self) -> int:
        return len(self.features)

    def part(self, places: slice) -> Features:
        """Some of the rows."""
        teacher = None if self.teacher is None else self.teacher[places]
        return Features(self.first + places.start, self.features[places], teacher)

    @property
    def places(self) -> slice:
        """The rows' numbers in the global batch."""
        return slice(self.first, self.first + len(self))


class LogitTiles:
    """Computes tiles, each in the memory of the one before."""

    def __init__(
        self,
        like: Tensor,
        *,
        scale: float,
        bias: float = 0.0,
        teacher_scale: float = 0.0,
        duplicates: PairDuplicates | None = None,
        masks_duplicates: bool = False,
    ) -> None:
        """
        Args:
            like: features, of whose type and device the tiles are made.
        """
        self.scale, self.bias, self.teacher_scale = scale, bias, teacher_scale
        self.duplicates, self.masks_duplicates = duplicates, masks_duplicates
        self.shape = TILE_SHAPES[like.device.type]
        size = self.shape[0] * self.shape[1]
        self.dtype = accumulation_type(like)
        self.memory = [torch.empty(size, dtype=self.dtype, device=like.device) for _ in range(2)]

    def of(self, media: Features, text: Features) -> Iterator[tuple[Tile, slice, slice]]:
        """(tile, its rows among the media, its columns among the captions), over all pairs."""
        for columns in parts_of(len(text), self.shape[1]):
            for rows in parts_of(len(media), self.shape[0]):
                yield self._tile(media.part(rows), text.part(columns)), rows, columns

    def _tile(self, media: Features, text: Features) -> Tile:
        size = len(media) * len(text)
        logits, spare = (memory[:size].view(len(media), len(text)) for memory in self.memory)
        product(media.features, text.features.T, out=logits, factor=self.scale)
        if self.bias:
            logits.add_(self.bias)
        teacher = None
        if media.teacher is not None:
            teacher = torch.empty_like(logits)
            product(media.teacher, text.teacher.T, out=teacher, factor=self.teacher_scale)
        rows, columns = media.places, text.places
        apart = self._set_apart(logits, teacher, rows, columns)
        tile = Tile(rows, columns, logits, spare, apart, teacher)
        if tile.own_places():
            tile.diagonal(logits).fill_(-torch.inf)
        return tile

    def _set_apart(
        self, logits: Tensor, teacher: Tensor | None, rows: slice, columns: slice
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        found = self.duplicates.within(rows, columns) if self.duplicates else None
        if found is None:
            return None
        values = logits[found]
        logits[found] = -torch.inf
        if teacher is not None and self.masks_duplicates:
            teacher[found] = -torch.inf
        return *found, values


def own_logits(media: Tensor, text: Tensor, *, scale: float, bias: float = 0.0) -> Tensor:
    """[B] of each row of media with the same row of text."""
    dtype = accumulation_type(media)
    return (media.to(dtype) * text.to(dtype)).sum(dim=-1) * scale + bias


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Products of float32 in the block are taken in float32, whatever autocast and flags allow."""
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    found = [backend.fp32_precision for backend in backends]
    legacy = _legacy_precision()
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
    for backend in backends:
        backend.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, found, strict=True):
            backend.fp32_precision = precision


def _legacy_precision() -> str:
    """What torch's older flag says; it must not contradict the newer ones, and is refused a look
    at where only those were set: then it is at its default."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def is_multiplied_as_is(features: Tensor) -> bool:
    """Whether the device's library multiplies features of this type into float32.

    It would do so with float16 too, but in float16 the small entries of G vanish.
    """
    return features.is_cuda and features.dtype == torch.bfloat16


def product(left: Tensor, right: Tensor, *, out: Tensor, factor: float) -> None:
    """Writes factor * left @ right to `out`, accumulated in its type; factors are converted to it
    where the device cannot multiply them as they are."""
    if is_multiplied_as_is(left):
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=0, alpha=factor, out=out)
    else:
        left, right = left.to(out.dtype), right.to(out.dtype)
        torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def as_factor(gradient: Tensor, features: Tensor) -> Tensor:
    """G in the type in which the device multiplies it with the features."""
    is_rounded = is_multiplied_as_is(features)
    return gradient.to(features.dtype if is_rounded else accumulation_type(features))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`.

    Args:
        left: as `as_factor` gives it, or its transpose.
        right: features.
    """
    if is_multiplied_as_is(right):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right.to(total.dtype), out=total)


def parts_of(length: int, size: int) -> list[slice]:
    """Consecutive parts of a length, each of that size but the last."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class PairDuplicates:
    """Which of N pairs are duplicates of one another."""

    def __init__(self, keys: Sequence[Tensor]) -> None:
        """
        Args:
            keys: each int64 [N]; equal keys, equal content.
        """
        self.keys = list(keys)
        self.num_alike = num_sharing_a_key(self.keys)  # int64 [N], itself counted
        self.exist = bool((self.num_alike > 1).any())

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """(row, column) of duplicates in a part of the [N, N] matrix, counted from its corner.

        A pair is no duplicate of itself. None where there are none.
        """
        if not self.exist:
            return None
        media = (self.num_alike[rows] > 1).nonzero().squeeze(1)
        text = (self.num_alike[columns] > 1).nonzero().squeeze(1)
        is_alike = torch.zeros(len(media), len(text), dtype=torch.bool, device=media.device)
        for key in self.keys:
            is_alike |= key[rows][media][:, None] == key[columns][text]
        is_alike &= (media + rows.start)[:, None] != text + columns.start
        row, column = is_alike.nonzero(as_tuple=True)
        return (media[row], text[column]) if len(row) else None


def num_sharing_a_key(keys: Sequence[Tensor]) -> Tensor:
    """int64 [N] how many pairs share at least one of one or two keys with each, itself counted."""
    if len(keys) == 1:
        return _num_equal(keys[0])
    first, second = keys
    both = torch.stack([first, second], dim=1)  # [N, 2]
    return _num_equal(first) + _num_equal(second) - _num_equal(both)


def _num_equal(key: Tensor) -> Tensor:
    _, group, sizes = key.unique(dim=0, return_inverse=True, return_counts=True)
    return sizes[group]
