"""Parts of the N x N logits for the kernels of fused_strips, which compute them block by block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.loss.logit_tiles import Features, PairDuplicates, accumulation_type, parts_of

TILE_COLUMNS = 4096
TILE_PLACES = 4096 * 4096  # 32 MiB of G in bfloat16


@dataclass(frozen=True)
class Blocks:
    """The part of a tile that one program computes, and its warps and stages of loading."""

    rows: int
    columns: int
    width: int  # features multiplied at once
    num_warps: int
    num_stages: int

    def launch_options(self) -> dict[str, int]:
        """What a launch is given of them."""
        return {
            "BLOCK_ROWS": self.rows,
            "BLOCK_COLUMNS": self.columns,
            "BLOCK_WIDTH": self.width,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


# Chosen by what the compiler for an H100 reports (registers, no spills); not measured on one yet.
BLOCKS = {
    torch.bfloat16: Blocks(128, 128, 64, num_warps=8, num_stages=3),
    torch.float32: Blocks(64, 64, 32, num_warps=4, num_stages=3),
}


@dataclass(frozen=True)
class FeatureTile:
    """Media `rows` and captions `columns`, numbered in the global batch, and how they compare."""

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
        """How the tile is cut up."""
        return BLOCKS[self.media.dtype]

    @property
    def num_blocks(self) -> tuple[int, int]:
        """(blocks of rows, blocks of columns)"""
        rows, columns = self.shape
        return num_parts(rows, self.blocks.rows), num_parts(columns, self.blocks.columns)

    def launch(self, kernel: Any, *arguments: Tensor | float, **settings: bool) -> None:
        """Runs a kernel, a program for each block, on the features and what else it takes."""
        rows, columns = self.num_blocks
        options = self.blocks.launch_options() | {"WIDTH": self.media.shape[1]}
        with torch.cuda.device_of(self.media):
            kernel[(rows * columns,)](self.media, self.text, *arguments, **settings, **options)

    def new_totals(self, num_figures: int) -> Tensor:
        """[figures, blocks] to be written."""
        num_blocks = self.num_blocks[0] * self.num_blocks[1]
        return self.media.new_empty((num_figures, num_blocks), dtype=torch.float32)

    @property
    def own_shift(self) -> int:
        """Row + own_shift is the column of a pair's own place."""
        return self.rows.start - self.columns.start


class FeatureTiles:
    """Parts of the matrix, as LogitTiles gives them, but without logits."""

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
            like: features, of whose type and device the tiles are.
        """
        assert duplicates is None and not teacher_scale, "loss_backend chooses LogitTiles for them"
        self.scale, self.bias = scale, bias
        self.dtype = accumulation_type(like)

    def of(self, media: Features, text: Features) -> Iterator[tuple[FeatureTile, slice, slice]]:
        """(tile, its rows among the media, its columns among the captions), over all pairs."""
        for columns in parts_of(len(text), TILE_COLUMNS):
            num_columns = columns.stop - columns.start
            for rows in parts_of(len(media), TILE_PLACES // num_columns // 128 * 128):
                some, others = media.part(rows), text.part(columns)
                places = some.places, others.places
                features = some.features, others.features
                yield FeatureTile(*places, *features, self.scale, self.bias), rows, columns


def num_parts(length: int, size: int) -> int:
    """Parts of that size that cover a length."""
    return -(-length // size)
