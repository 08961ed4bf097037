"""Strips whose tiles are computed, used and forgotten inside Triton kernels: the same losses.

A tile's logits never reach memory. What does is a few numbers per row and column of each block, and
G, in the features' own type, for a tile small enough that the products that follow find it in L2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed.collectives import RowSplit
from pretrain.loss.feature_tiles import FeatureTile, num_parts
from pretrain.loss.in_batch_recall import InBatchHits
from pretrain.loss.kernels import observe_softmax, take_sigmoid, write_coefficients
from pretrain.loss.logit_kernels import fold
from pretrain.loss.sigmoid import SigmoidStrips
from pretrain.loss.softmax import SoftmaxStrips, SoftmaxTargets
from pretrain.loss.softmax_sums import SoftmaxSums

FOLDED_PLACES = 128  # rows or columns per program of `fold`


class PartialFigures:
    """What the blocks of a tile found for its rows and columns, until `add_to` folds it."""

    def __init__(
        self, tile: FeatureTile, sums: SoftmaxSums | None = None, shift: Tensor | None = None
    ) -> None:
        """
        Args:
            sums: of the softmax, that they will be added to.
            shift: float64 [1] theirs.
        """
        (rows, columns), (row_blocks, column_blocks) = tile.shape, tile.num_blocks
        self.tile, self.softmax_sums, self.shift = tile, sums, shift
        sizes = (column_blocks, rows), (row_blocks, columns)
        new = tile.media.new_empty
        self.codes = [new(size, dtype=torch.int32) for size in sizes]
        self.sums: list[Tensor | None] = [None, None]
        if sums is not None:
            per_place = 1 if sums.is_plain else 2
            self.sums = [new((per_place, *size), dtype=torch.float32) for size in sizes]

    def add_to(self, hits: InBatchHits) -> None:
        """Adds them to the hits, and to the softmax's sums where there are any."""
        tile, sums = self.tile, self.softmax_sums
        places = tile.rows, tile.columns
        arguments = []
        for side, place in enumerate(places):
            kept = None if sums is None else (sums.rows, sums.columns)[side][place]
            beaten = hits.is_beaten[side, place].view(torch.uint8)
            ties = hits.num_ties[side, place]
            arguments += [self.sums[side], self.codes[side], kept, beaten, ties]
        num_programs = sum(num_parts(length, FOLDED_PLACES) for length in tile.shape)
        with torch.cuda.device_of(tile.media):
            fold[(num_programs,)](
                *arguments,
                self.shift,
                *tile.shape,
                *tile.num_blocks,
                HAS_SUMS=sums is not None,
                IS_PLAIN=sums is None or sums.is_plain,
                BLOCK=FOLDED_PLACES,
                num_warps=4,
            )


class FusedSoftmaxStrips(SoftmaxStrips):
    """CLIP's loss with own pairs as the only targets."""

    def __init__(
        self,
        positives: Tensor,
        split: RowSplit,
        hits: InBatchHits,
        targets: SoftmaxTargets,
        *,
        scale: float,
    ) -> None:
        super().__init__(positives, split, hits, targets, scale=scale)
        assert targets.are_own_pairs_alone, "loss_backend chooses SoftmaxStrips for others"
        self.shift = positives.new_full((1,), self.sums.shift, dtype=torch.float64)
        self.logit_sum = torch.zeros_like(self.targets.gap)
        self.scale = scale

    def observe(self, tile: FeatureTile) -> None:
        """Adds a tile of this rank's rows to both directions' sums."""
        found = PartialFigures(tile, self.sums, self.shift)
        tile.launch(
            observe_softmax,
            self.positives[tile.rows],
            self.positives[tile.columns],
            *found.sums,
            *found.codes,
            *tile.shape,
            tile.own_shift,
            tile.scale,
            self.hits.tolerance,
            IS_PLAIN=self.sums.is_plain,
        )
        found.add_to(self.hits)

    @property
    def scale_sum(self) -> Tensor:
        """float64 sum of G * cosine over this rank's rows, of G before it was rounded."""
        return self.logit_sum / self.scale

    def own_coefficients(self, tile: FeatureTile) -> Tensor:
        """G of a tile of this rank's rows, which is added to the scale's gradient."""
        totals = tile.new_totals(1)
        gradient = self._write(tile, totals)
        self.logit_sum += totals.sum(dtype=torch.float64)
        return gradient

    def coefficients(self, tile: FeatureTile) -> Tensor:
        """G of a tile: [rows, columns] in the features' type."""
        return self._write(tile, None)

    def _write(self, tile: FeatureTile, totals: Tensor | None) -> Tensor:
        gradient = tile.media.new_empty(tile.shape)
        tile.launch(
            write_coefficients,
            self.weights.row_log_sums[tile.rows],
            self.weights.column_log_sums[tile.columns],
            self.own_gradient[tile.rows],
            gradient,
            totals,
            *tile.shape,
            tile.own_shift,
            tile.scale,
            COUNTS=totals is not None,
            IS_PLAIN=self.weights.is_plain,
        )
        return gradient


class FusedSigmoidStrips(SigmoidStrips):
    """SigLIP's loss with own pairs as the only positives."""

    def __init__(
        self, positives: Tensor, split: RowSplit, hits: InBatchHits, *, masks_duplicates: bool
    ) -> None:
        super().__init__(positives, split, hits, masks_duplicates=masks_duplicates)
        none = torch.zeros_like(self.loss_sum)
        self.totals = torch.stack([self.loss_sum, none, none])  # as the kernel's, over all tiles
        self.loss_sum, self.bias_sum, self.logit_sum = self.totals
        self.scale = 1.0  # of a rank without rows, whose sum is 0

    @property
    def scale_sum(self) -> Tensor:
        """float64 sum of G * cosine over this rank's rows, of G before it was rounded."""
        return self.logit_sum / self.scale

    def observe(self, tile: FeatureTile) -> None:
        """Adds a tile of this rank's rows to the loss."""
        self._take(tile, gradient=None, counts=True)

    def own_coefficients(self, tile: FeatureTile) -> Tensor:
        """G of a tile of this rank's rows, which is added to the loss and the bias's gradient."""
        return self._take(tile, gradient=tile.media.new_empty(tile.shape), counts=True)

    def coefficients(self, tile: FeatureTile) -> Tensor:
        """G of a tile: [rows, columns] in the features' type."""
        return self._take(tile, gradient=tile.media.new_empty(tile.shape), counts=False)

    def _take(self, tile: FeatureTile, *, gradient: Tensor | None, counts: bool) -> Tensor | None:
        found = PartialFigures(tile) if counts else None
        totals = tile.new_totals(1 if gradient is None else 3) if counts else None
        self.scale = tile.scale
        tile.launch(
            take_sigmoid,
            self.positives[tile.rows],
            self.positives[tile.columns],
            gradient,
            totals,
            *(found.codes if counts else (None, None)),
            *tile.shape,
            tile.own_shift,
            tile.scale,
            tile.bias,
            self.hits.tolerance,
            WRITES=gradient is not None,
            COUNTS=counts,
        )
        if counts:
            found.add_to(self.hits)
            self.totals[: len(totals)] += totals.sum(dim=1, dtype=torch.float64)
        return gradient
