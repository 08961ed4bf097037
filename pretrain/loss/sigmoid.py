"""SigLIP's loss from logit tiles (Zhai et al. 2023, equation 1): one pass, no normaliser.

With l_ij = scale * <I_i, T_j> + bias, and y_ij = 1 if caption j belongs to media i, else 0,

    L = 1/N * sum_ij [ softplus(l_ij) - y_ij l_ij ]        G_ij = N dL/dl_ij = sigmoid(l_ij) - y_ij

For positives the code computes softplus(-l) and -sigmoid(-l), which are accurate for large l.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.distributed.collectives import RowSplit, sum_over_ranks
from pretrain.loss.gpu_compiler import compiled_on_gpu
from pretrain.loss.in_batch_recall import InBatchRecall
from pretrain.loss.logit_tiles import Tile

# Above it, softplus(x) = x, which is exact in float64 at 50 but not at torch's default of 20.
SOFTPLUS_THRESHOLD = 50


def softplus(values: Tensor) -> Tensor:
    """Computes log(1 + exp(x)) elementwise, also accurately for large x."""
    return functional.softplus(values, threshold=SOFTPLUS_THRESHOLD)


@compiled_on_gpu
def losses_of_negatives(logits: Tensor) -> Tensor:
    """Sums softplus over [rows, columns] logits; float64 scalar."""
    return softplus(logits).sum(dim=-1).double().sum()


class TiledSigmoidLoss:
    """Sigmoid loss computed from logit tiles: running sums and gradient coefficients."""

    needs_all_tiles_first = False
    scale_sum = None  # computed from the gradient of the media

    def __init__(
        self, positives: Tensor, split: RowSplit, recall: InBatchRecall, *, masks_duplicates: bool
    ) -> None:
        """
        Args:
            positives: [N] logits of the own pairs; this rank's are set, and those of other ranks
                are set as their rows arrive.
        """
        self.positives, self.split, self.recall = positives, split, recall
        self.masks_duplicates = masks_duplicates
        self.gradient_factor = 1 / split.total  # dL/dl = factor * G
        self.loss_sum = softplus(-positives[split.own].double()).sum()
        self.bias_sum = torch.zeros_like(self.loss_sum)  # sum of G over this rank's rows

    def observe(self, tile: Tile) -> None:
        """Adds a tile of this rank's rows to the loss."""
        self.recall.observe(tile.logits, rows=tile.rows, columns=tile.columns)
        self.loss_sum += losses_of_negatives(tile.logits)
        if tile.excluded and not self.masks_duplicates:
            self.loss_sum += softplus(-tile.excluded[2].double()).sum()

    def merge(self, *, for_all_rows: bool) -> None:
        """Sums over ranks after all tiles have been observed; every rank must call it.

        Sets `value`, `media_hits` and `text_hits`.
        """
        num_ranks = len(self.split.counts)
        codes = self.recall.packed_text_codes(num_ranks)
        own = torch.stack([self.loss_sum, self.recall.media_hits(self.split.own)])
        total = sum_over_ranks(torch.cat([own, codes]))
        self.value = total[0] / self.split.total
        self.media_hits = total[1]
        self.text_hits = self.recall.text_hits(total[2:], num_ranks)

    def coefficients(self, tile: Tile) -> Tensor:
        """Returns G of a tile, [rows, columns]."""
        gradient = torch.sigmoid(tile.logits, out=tile.scratch)
        if tile.excluded and not self.masks_duplicates:
            row, column, logits = tile.excluded
            gradient[row, column] = -torch.sigmoid(-logits)
        own = tile.own_pairs()
        if own:
            tile.diagonal(gradient).copy_(-torch.sigmoid(-self.positives[own[0]]))
        return gradient

    def own_coefficients(self, tile: Tile) -> Tensor:
        """Returns G of a tile of this rank's rows; adds it to the loss and the bias gradient."""
        self.observe(tile)
        gradient = self.coefficients(tile)
        self.bias_sum += gradient.sum(dim=-1).double().sum()
        return gradient
