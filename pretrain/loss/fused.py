"""Losses whose logits exist only inside Triton kernels; equivalent to softmax.py and sigmoid.py.

The logits of a tile never reach global memory. The kernels write a few numbers per row and column
of each block, and G in the dtype of the features. Tiles are small enough for the subsequent matrix
products to find G in the L2 cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed.collectives import RowSplit
from pretrain.loss.feature_tiles import FeatureTile, ceil_div
from pretrain.loss.in_batch_recall import InBatchRecall
from pretrain.loss.kernels import compute_sigmoid, observe_softmax, write_coefficients
from pretrain.loss.logit_kernels import fold
from pretrain.loss.sigmoid import TiledSigmoidLoss
from pretrain.loss.softmax import SoftmaxTargets, TiledSoftmaxLoss
from pretrain.loss.softmax_sums import SoftmaxSums

FOLD_BLOCK = 128  # rows or columns per program of the kernel `fold`


class BlockResults:
    """Per-block results for the rows and columns of a tile, combined by `add_to`."""

    def __init__(
        self, tile: FeatureTile, sums: SoftmaxSums | None = None, shift: Tensor | None = None
    ) -> None:
        """
        Args:
            sums: softmax sums to add the results to; None for the sigmoid loss.
            shift: float64 [1], shift of the exponents of `sums`.
        """
        (rows, columns), (row_blocks, column_blocks) = tile.shape, tile.num_blocks
        self.tile, self.softmax_sums, self.shift = tile, sums, shift
        sizes = (column_blocks, rows), (row_blocks, columns)
        new = tile.media.new_empty
        self.codes = [new(size, dtype=torch.int32) for size in sizes]
        self.sums: list[Tensor | None] = [None, None]
        if sums is not None:
            per_row = 1 if sums.is_plain else 2  # the sum, and the maximum that was subtracted
            self.sums = [new((per_row, *size), dtype=torch.float32) for size in sizes]

    def add_to(self, recall: InBatchRecall) -> None:
        """Adds the results to the recall's state and, for the softmax loss, to its sums."""
        tile, sums = self.tile, self.softmax_sums
        arguments = []
        for side, indices in enumerate((tile.rows, tile.columns)):
            totals = None if sums is None else (sums.rows, sums.columns)[side][indices]
            beaten = recall.is_beaten[side, indices].view(torch.uint8)
            ties = recall.num_ties[side, indices]
            arguments += [self.sums[side], self.codes[side], totals, beaten, ties]
        num_programs = sum(ceil_div(length, FOLD_BLOCK) for length in tile.shape)
        with torch.cuda.device_of(tile.media):
            fold[(num_programs,)](
                *arguments,
                self.shift,
                *tile.shape,
                *tile.num_blocks,
                HAS_SUMS=sums is not None,
                IS_PLAIN=sums is None or sums.is_plain,
                BLOCK=FOLD_BLOCK,
                num_warps=4,
            )


class FusedSoftmaxLoss(TiledSoftmaxLoss):
    """Softmax loss from Triton kernels, with own pairs as the only targets."""

    def __init__(
        self,
        positives: Tensor,
        split: RowSplit,
        recall: InBatchRecall,
        targets: SoftmaxTargets,
        *,
        scale: float,
    ) -> None:
        super().__init__(positives, split, recall, targets, scale=scale)
        assert targets.are_one_hot, "backend.py chooses TiledSoftmaxLoss for others"
        self.shift = positives.new_full((1,), self.sums.shift, dtype=torch.float64)
        self.logit_sum = torch.zeros_like(self.targets.gap)
        self.scale = scale

    def observe(self, tile: FeatureTile) -> None:
        """Adds a tile of this rank's rows to the sums of rows and columns."""
        results = BlockResults(tile, self.sums, self.shift)
        tile.launch(
            observe_softmax,
            self.positives[tile.rows],
            self.positives[tile.columns],
            *results.sums,
            *results.codes,
            *tile.shape,
            tile.own_shift,
            tile.scale,
            self.recall.tolerance,
            IS_PLAIN=self.sums.is_plain,
        )
        results.add_to(self.recall)

    @property
    def scale_sum(self) -> Tensor:
        """Sum of G * cosine over this rank's rows, with unrounded G; float64 scalar."""
        return self.logit_sum / self.scale

    def own_coefficients(self, tile: FeatureTile) -> Tensor:
        """Returns G of a tile of this rank's rows; adds it to the scale's gradient."""
        totals = tile.new_totals(1)
        gradient = self._write(tile, totals)
        self.logit_sum += totals.sum(dtype=torch.float64)
        return gradient

    def coefficients(self, tile: FeatureTile) -> Tensor:
        """Returns G of a tile, [rows, columns], in the dtype of the features."""
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


class FusedSigmoidLoss(TiledSigmoidLoss):
    """Sigmoid loss from Triton kernels, with own pairs as the only positives."""

    def __init__(
        self, positives: Tensor, split: RowSplit, recall: InBatchRecall, *, masks_duplicates: bool
    ) -> None:
        super().__init__(positives, split, recall, masks_duplicates=masks_duplicates)
        none = torch.zeros_like(self.loss_sum)
        self.totals = torch.stack([self.loss_sum, none, none])  # in the order of the kernel's
        self.loss_sum, self.bias_sum, self.logit_sum = self.totals
        self.scale = 1.0  # divides a sum of 0 on ranks without rows

    @property
    def scale_sum(self) -> Tensor:
        """Sum of G * cosine over this rank's rows, with unrounded G; float64 scalar."""
        return self.logit_sum / self.scale

    def observe(self, tile: FeatureTile) -> None:
        """Adds a tile of this rank's rows to the loss."""
        self._launch(tile, gradient=None, counts=True)

    def own_coefficients(self, tile: FeatureTile) -> Tensor:
        """Returns G of a tile of this rank's rows; also adds to the loss and shared gradients."""
        return self._launch(tile, gradient=tile.media.new_empty(tile.shape), counts=True)

    def coefficients(self, tile: FeatureTile) -> Tensor:
        """Returns G of a tile, [rows, columns], in the dtype of the features."""
        return self._launch(tile, gradient=tile.media.new_empty(tile.shape), counts=False)

    def _launch(self, tile: FeatureTile, *, gradient: Tensor | None, counts: bool) -> Tensor | None:
        results = BlockResults(tile) if counts else None
        totals = tile.new_totals(1 if gradient is None else 3) if counts else None
        self.scale = tile.scale
        tile.launch(
            compute_sigmoid,
            self.positives[tile.rows],
            self.positives[tile.columns],
            gradient,
            totals,
            *(results.codes if counts else (None, None)),
            *tile.shape,
            tile.own_shift,
            tile.scale,
            tile.bias,
            self.recall.tolerance,
            WRITES=gradient is not None,
            COUNTS=counts,
        )
        if counts:
            results.add_to(self.recall)
            self.totals[: len(totals)] += totals.sum(dim=1, dtype=torch.float64)
        return gradient
