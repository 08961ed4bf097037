"""Tiles of the N x N logits, computed one at a time so that the full matrix never exists.

A tile holds the logits of some media with some captions. Own pairs (entries of the main diagonal)
and duplicates that are not negatives are excluded: their entries are minus infinity, and their
terms are added separately. A nearly perfect match is then not lost to rounding in large sums.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# Rows and columns of a tile by device; two tiles of at most 32 MiB each exist at a time.
TILE_SHAPES = {"cpu": (512, 2048), "cuda": (2048, 4096)}


def accumulation_type(features: Tensor) -> torch.dtype:
    """Returns the dtype of logits and sums: float64 for float64 features, else float32."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Tile:
    """Logits of media `rows` with captions `columns`, as indices in the global batch."""

    rows: slice
    columns: slice
    logits: Tensor  # [rows, columns], minus infinity for pairs that are not negatives
    scratch: Tensor  # [rows, columns], may be overwritten
    # Excluded duplicates: row and column in the tile, and logits, each [duplicates]
    excluded: tuple[Tensor, Tensor, Tensor] | None
    teacher_logits: Tensor | None  # [rows, columns], minus infinity for masked duplicates

    def own_pairs(self) -> tuple[slice, slice] | None:
        """Locates the own pairs in the tile.

        Returns:
            (indices in the global batch, rows of the tile), or None if the tile has no own pair.
        """
        first = max(self.rows.start, self.columns.start)
        stop = min(self.rows.stop, self.columns.stop)
        if first >= stop:
            return None
        return slice(first, stop), slice(first - self.rows.start, stop - self.rows.start)

    def diagonal(self, values: Tensor) -> Tensor:
        """Returns a view of the entries of own pairs, [pairs].

        Args:
            values: [rows, columns].
        """
        first = max(self.rows.start, self.columns.start)
        stop = min(self.rows.stop, self.columns.stop)
        block = values[
            first - self.rows.start : stop - self.rows.start,
            first - self.columns.start : stop - self.columns.start,
        ]
        return block.diagonal()


@dataclass(frozen=True)
class Features:
    """Consecutive rows of the media or captions of the global batch."""

    first: int  # index of the first row in the global batch
    features: Tensor  # [rows, D], L2-normalised
    teacher: Tensor | None = None  # [rows, teacher's D], L2-normalised

    def __len__(self) -> int:
        return len(self.features)

    def select(self, rows: slice) -> Features:
        """Returns a slice of the rows."""
        teacher = None if self.teacher is None else self.teacher[rows]
        return Features(self.first + rows.start, self.features[rows], teacher)

    @property
    def indices(self) -> slice:
        """Indices of the rows in the global batch."""
        return slice(self.first, self.first + len(self))


class LogitTiles:
    """Computes tiles; each overwrites the previous one."""

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
            like: features with the dtype and device of the tiles' inputs.
        """
        self.scale, self.bias, self.teacher_scale = scale, bias, teacher_scale
        self.duplicates, self.masks_duplicates = duplicates, masks_duplicates
        self.shape = TILE_SHAPES[like.device.type]
        size = self.shape[0] * self.shape[1]
        self.dtype = accumulation_type(like)
        self.memory = [torch.empty(size, dtype=self.dtype, device=like.device) for _ in range(2)]

    def compute(self, media: Features, text: Features) -> Iterator[tuple[Tile, slice, slice]]:
        """Yields the tiles of all media with all captions.

        Yields:
            (tile, its rows among the media, its columns among the captions)
        """
        for columns in consecutive_slices(len(text), self.shape[1]):
            for rows in consecutive_slices(len(media), self.shape[0]):
                yield self._tile(media.select(rows), text.select(columns)), rows, columns

    def _tile(self, media: Features, text: Features) -> Tile:
        size = len(media) * len(text)
        logits, scratch = (memory[:size].view(len(media), len(text)) for memory in self.memory)
        product(media.features, text.features.T, out=logits, factor=self.scale)
        if self.bias:
            logits.add_(self.bias)
        teacher = None
        if media.teacher is not None:
            teacher = torch.empty_like(logits)
            product(media.teacher, text.teacher.T, out=teacher, factor=self.teacher_scale)
        rows, columns = media.indices, text.indices
        excluded = self._exclude_duplicates(logits, teacher, rows, columns)
        tile = Tile(rows, columns, logits, scratch, excluded, teacher)
        if tile.own_pairs():
            tile.diagonal(logits).fill_(-torch.inf)
        return tile

    def _exclude_duplicates(
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
    """Computes the logits of own pairs, [B].

    Args:
        media: [B, D], L2-normalised.
        text: [B, D], L2-normalised.
    """
    dtype = accumulation_type(media)
    return (media.to(dtype) * text.to(dtype)).sum(dim=-1) * scale + bias


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Disables autocast and TF32 in a `with` block, so that float32 is multiplied exactly."""
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
    """Returns torch's legacy precision flag, which must not contradict the newer ones.

    torch raises an error on reading it if only the newer flags were set; it is then the default.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"


def is_multiplied_as_is(features: Tensor) -> bool:
    """Returns whether the device's library multiplies this dtype with float32 output.

    float16 is converted even though the library supports it, because small entries of G underflow.
    """
    return features.is_cuda and features.dtype == torch.bfloat16


def product(left: Tensor, right: Tensor, *, out: Tensor, factor: float) -> None:
    """Writes factor * left @ right to `out`, accumulated in the dtype of `out`.

    Args:
        left: [rows, D]; converted to the dtype of `out` if the device cannot multiply it directly.
        right: [D, columns]; converted likewise.
        out: [rows, columns].
    """
    if is_multiplied_as_is(left):
        torch.addmm(out, left, right, out_dtype=out.dtype, beta=0, alpha=factor, out=out)
    else:
        left, right = left.to(out.dtype), right.to(out.dtype)
        torch.addmm(out, left, right, beta=0, alpha=factor, out=out)


def as_factor(gradient: Tensor, features: Tensor) -> Tensor:
    """Casts G to the dtype in which the device multiplies it with the features."""
    is_rounded = is_multiplied_as_is(features)
    return gradient.to(features.dtype if is_rounded else accumulation_type(features))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Adds left @ right to `total`.

    Args:
        total: [rows, D].
        left: [rows, columns], result of `as_factor`, possibly transposed.
        right: [columns, D] features.
    """
    if is_multiplied_as_is(right):
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right.to(total.dtype), out=total)


def consecutive_slices(length: int, size: int) -> list[slice]:
    """Splits range(length) into consecutive slices; the last one may be shorter than `size`."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class PairDuplicates:
    """Duplicates among the N pairs of the global batch: pairs that share a key."""

    def __init__(self, keys: Sequence[Tensor]) -> None:
        """
        Args:
            keys: one or two int64 [N]; pairs with an equal key have equal content.
        """
        self.keys = list(keys)
        self.num_alike = num_sharing_a_key(self.keys)  # int64 [N], including the pair itself
        self.exist = bool((self.num_alike > 1).any())

    def within(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor] | None:
        """Locates the duplicates in a block of the [N, N] matrix; a pair is not its own duplicate.

        Returns:
            (row, column) within the block, each int64 [duplicates]; None if there are none.
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
    """Counts the pairs that share a key with each pair, including the pair itself; int64 [N].

    Args:
        keys: one or two int64 [N].
    """
    if len(keys) == 1:
        return _num_equal(keys[0])
    first, second = keys
    both = torch.stack([first, second], dim=1)  # [N, 2]
    return _num_equal(first) + _num_equal(second) - _num_equal(both)


def _num_equal(key: Tensor) -> Tensor:
    _, group, sizes = key.unique(dim=0, return_inverse=True, return_counts=True)
    return sizes[group]
