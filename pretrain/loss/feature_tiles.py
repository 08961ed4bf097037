"""Tiles of features from which the kernels of fused.py compute logits block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.loss.logit_tiles import (
    Features,
    PairDuplicates,
    accumulation_type,
    consecutive_slices,
)

TILE_COLUMNS = 4096
TILE_ENTRIES = 4096 * 4096  # 32 MiB of G in bfloat16


@dataclass(frozen=True)
class Blocks:
    """Size of the block of a tile that one kernel program computes, and its launch options."""

    rows: int
    columns: int
    width: int  # elements of a feature vector loaded at once
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """Returns the keyword arguments of a kernel launch."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_WIDTH": self.width,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Chosen by the registers and spills that the compiler reports for an H100; for bfloat16 within 2 %
# of the fastest on an H200 (tests/benchmarks/RESULTS.md).
BLOCKS = {
    torch.bfloat16: Blocks(128, 128, 64, num_warps=8, num_stages=3),
    torch.float32: Blocks(64, 64, 32, num_warps=4, num_stages=3),
}


@dataclass(frozen=True)
class FeatureTile:
    """Features of media `rows` and captions `columns`, as indices in the global batch."""

    rows: slice
    columns: slice
    media: Tensor  # [rows, D]
    text: Tensor  # [columns, D]
    scale: float
    bias: float

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)"""
        return len(self.media), len(self.text)

    @property
    def blocks(self) -> Blocks:
        """Size of the blocks for the dtype of the features."""
        return BLOCKS[self.media.dtype]

    @property
    def num_blocks(self) -> tuple[int, int]:
        """(blocks of rows, blocks of columns)"""
        rows, columns = self.shape
        return ceil_div(rows, self.blocks.rows), ceil_div(columns, self.blocks.columns)

    def launch(self, kernel: Any, *arguments: Tensor | float, **settings: bool) -> None:
        """Launches a kernel with one program per block.

        Args:
            kernel: receives media, text, `arguments`, and `settings` as compile-time constants.
        """
        rows, columns = self.num_blocks
        options = self.blocks.launch_options() | {"WIDTH": self.media.shape[1]}
        with torch.cuda.device_of(self.media):
            kernel[(rows * columns,)](self.media, self.text, *arguments, **settings, **options)

    def new_totals(self, num_totals: int) -> Tensor:
        """Allocates [totals, blocks] for a kernel to write."""
        num_blocks = self.num_blocks[0] * self.num_blocks[1]
        return self.media.new_empty((num_totals, num_blocks), dtype=torch.float32)

    @property
    def own_shift(self) -> int:
        """Column offset of own pairs: that of tile row r is in column r + own_shift."""
        return self.rows.start - self.columns.start


class FeatureTiles:
    """Yields tiles like LogitTiles, but with features in place of logits."""

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
        assert duplicates is None and not teacher_scale, "backend.py chooses LogitTiles for them"
        self.scale, self.bias = scale, bias
        self.dtype = accumulation_type(like)

    def compute(
        self, media: Features, text: Features
    ) -> Iterator[tuple[FeatureTile, slice, slice]]:
        """Yields the tiles of all media with all captions.

        Yields:
            (tile, its rows among the media, its columns among the captions)
        """
        for columns in consecutive_slices(len(text), TILE_COLUMNS):
            num_columns = columns.stop - columns.start
            for rows in consecutive_slices(len(media), TILE_ENTRIES // num_columns // 128 * 128):
                of_rows, of_columns = media.select(rows), text.select(columns)
                indices = of_rows.indices, of_columns.indices
                features = of_rows.features, of_columns.features
                yield FeatureTile(*indices, *features, self.scale, self.bias), rows, columns


def ceil_div(length: int, size: int) -> int:
    """Returns length / size, rounded up."""
    return -(-length // size)
