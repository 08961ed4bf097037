"""SigLIP's loss over strips of logits (Zhai et al. 2023, equation 1): one pass, no normaliser.

With l_ij = scale * <I_i, T_j> + bias and y_ij = 1 where caption j belongs to media i, else 0,

    L = 1/N * sum_ij [ softplus(l_ij) - y_ij l_ij ]        G_ij = N dL/dl_ij = sigmoid(l_ij) - y_ij

At positives these are softplus(-l) and -sigmoid(-l), which lose nothing when l is large.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.distributed.collectives import RowSplit, sum_over_ranks
from pretrain.loss.gpu_compiler import compiled_on_gpu
from pretrain.loss.in_batch_recall import InBatchHits
from pretrain.loss.logit_tiles import Tile

# Above it softplus(x) is x: at 50 that is exact in float64; torch's own default of 20 is not.
SOFTPLUS_THRESHOLD = 50


def softplus(values: Tensor) -> Tensor:
    """log(1 + exp(x)), exact for large x too."""
    return functional.softplus(values, threshold=SOFTPLUS_THRESHOLD)


@compiled_on_gpu
def losses_of_negatives(logits: Tensor) -> Tensor:
    """float64 sum over [rows, columns]."""
    return softplus(logits).sum(dim=-1).double().sum()


class SigmoidStrips:
    """The sums that tiles add to, and the gradient coefficients of a tile."""

    needs_all_tiles_first = False
    scale_sum = None  # the gradients' sums serve

    def __init__(
        self, positives: Tensor, split: RowSplit, hits: InBatchHits, *, masks_duplicates: bool
    ) -> None:
        """
        Args:
            positives: [N] logits of the own pairs; this rank's are filled in.
        """
        self.positives, self.split, self.hits = positives, split, hits
        self.masks_duplicates = masks_duplicates
        self.gradient_factor = 1 / split.total  # dL/dl = factor * G
        self.loss_sum = softplus(-positives[split.own].double()).sum()
        self.bias_sum = torch.zeros_like(self.loss_sum)  # of G over this rank's rows

    def observe(self, tile: Tile) -> None:
        """Adds a tile of this rank's rows to the loss."""
        self.hits.observe(tile.logits, rows=tile.rows, columns=tile.columns)
        self.loss_sum += losses_of_negatives(tile.logits)
        if tile.apart and not self.masks_duplicates:
            self.loss_sum += softplus(-tile.apart[2].double()).sum()

    def merge(self, *, for_all_rows: bool) -> None:
        """Sums over ranks, once all tiles were observed; every rank must reach it."""
        num_ranks = len(self.split.counts)
        words = self.hits.text_words(num_ranks)
        own = torch.stack([self.loss_sum, self.hits.media_hits(self.split.own)])
        total = sum_over_ranks(torch.cat([own, words]))
        self.value = total[0] / self.split.total
        self.media_hits = total[1]
        self.text_hits = self.hits.text_hits(total[2:], num_ranks)

    def coefficients(self, tile: Tile) -> Tensor:
        """G of a tile: [rows, columns]."""
        gradient = torch.sigmoid(tile.logits, out=tile.spare)
        if tile.apart and not self.masks_duplicates:
            row, column, logits = tile.apart
            gradient[row, column] = -torch.sigmoid(-logits)
        own = tile.own_places()
        if own:
            tile.diagonal(gradient).copy_(-torch.sigmoid(-self.positives[own[0]]))
        return gradient

    def own_coefficients(self, tile: Tile) -> Tensor:
        """G of a tile of this rank's rows, which is added to the loss and the bias's gradient."""
        self.observe(tile)
        gradient = self.coefficients(tile)
        self.bias_sum += gradient.sum(dim=-1).double().sum()
        return gradient
