"""CLIP's loss over strips of logits (Radford et al. 2021, figure 3): two passes.

With l_ij = scale * <I_i, T_j>, targets t_ij of media i and u_ij of caption j (each sums to 1),
r_i and c_j the log-sum-exps of row i and column j,

    L = 1/2N * [ sum_i (r_i - sum_j t_ij l_ij)  +  sum_j (c_j - sum_i u_ij l_ij) ]
    G_ij = 2N dL/dl_ij = exp(l_ij - r_i) + exp(l_ij - c_j) - t_ij - u_ij

The first pass takes both log-sum-exps from the same tiles; a rank's part of every column is merged
with the others' by one sum over ranks. The second computes the tiles again, and G.

Nothing cancels at a nearly perfect match, for the own pair p_i = l_ii stays out of the sums: with
n_i the log-sum-exp of row i without it, r_i - p_i = softplus(n_i - p_i), and the probability of the
own caption is 1 - sigmoid(n_i - p_i). Columns alike.

Targets are 1 at the own pair; with label smoothing e, (1 - e) there and e / K over the K pairs
that are not masked; of duplicates as positives, each has an equal share of that (1 - e). A teacher
with weight w makes them (1 - w) times these plus w times its own softmax of the row or column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.distributed.collectives import RowSplit, sum_over_ranks
from pretrain.loss.in_batch_recall import InBatchHits
from pretrain.loss.logit_tiles import Tile
from pretrain.loss.sigmoid import softplus
from pretrain.loss.softmax_sums import SoftmaxSums
from pretrain.loss.softmax_targets import SoftmaxTargets


class SoftmaxStrips:
    """The sums that tiles add to, and the gradient coefficients of a tile."""

    needs_all_tiles_first = True
    scale_sum = None  # the gradients' sums serve

    def __init__(
        self,
        positives: Tensor,
        split: RowSplit,
        hits: InBatchHits,
        targets: SoftmaxTargets,
        *,
        scale: float,
    ) -> None:
        """
        Args:
            positives: [N] logits of the own pairs; this rank's are filled in, those of others as
                their rows arrive.
        """
        self.positives, self.split, self.hits, self.targets = positives, split, hits, targets
        self.gradient_factor = 1 / (2 * split.total)  # dL/dl = factor * G
        self.sums = SoftmaxSums(positives, largest_logit=abs(scale))

    def observe(self, tile: Tile) -> None:
        """Adds a tile of this rank's rows to both directions' sums."""
        self.hits.observe(tile.logits, rows=tile.rows, columns=tile.columns)
        self.targets.observe(tile, self.positives)
        self.sums.add(tile.logits, tile.rows, tile.columns, spare=tile.spare)
        if tile.apart and not self.targets.masks_duplicates:
            row, column, logits = tile.apart
            self.sums.add_places(logits, row + tile.rows.start, column + tile.columns.start)

    def merge(self, *, for_all_rows: bool) -> None:
        """Sums over ranks, once all tiles were observed; every rank must reach it.

        Args:
            for_all_rows: coefficients will be asked for rows of other ranks too.
        """
        own, num_ranks = self.split.own, len(self.split.counts)
        positives = self.positives.double()
        row_excess = softplus(self.sums.log_of_rows()[own] - positives[own])  # r_i - p_i
        target_gap = self.targets.own_gap(positives, own)
        figures = torch.stack([row_excess.sum(), target_gap, self.hits.media_hits(own)])
        partial = self.sums.to_merge(for_all_rows=for_all_rows)
        of_teacher = self.targets.to_merge(for_all_rows=for_all_rows)
        parts = [figures, self.hits.text_words(num_ranks), *partial, *of_teacher]
        merged = sum_over_ranks(torch.cat(parts)).split([len(part) for part in parts])
        figures, words = merged[:2]
        self.sums.take_merged(merged[2 : 2 + len(partial)])
        self.targets.take_merged(merged[2 + len(partial) :])
        self.text_hits = self.hits.text_hits(words, num_ranks)
        self.media_hits = figures[2]
        self._take_log_sum_exps(positives)
        column_excess = softplus(self.others_of_columns)  # c_j - p_j
        gap = figures[1] + self.targets.gap_of_columns(positives)
        self.value = (figures[0] + column_excess.sum() + gap) * self.gradient_factor

    def _take_log_sum_exps(self, positives: Tensor) -> None:
        others_of_rows = self.sums.log_of_rows() - positives  # n_i - p_i
        self.others_of_columns = self.sums.log_of_columns() - positives
        self.row_log_sums = positives + softplus(others_of_rows)  # r_i
        self.column_log_sums = positives + softplus(self.others_of_columns)  # c_j
        lost = torch.sigmoid(others_of_rows) + torch.sigmoid(self.others_of_columns)
        self.own_gradient = self.targets.gap_of_own_place() - lost  # G_ii without a teacher
        self.weights = self.sums.weights(self.row_log_sums, self.column_log_sums)

    def coefficients(self, tile: Tile) -> Tensor:
        """G of a tile: [rows, columns]."""
        gradient = self.weights.probabilities(tile.logits, tile.rows, tile.columns, tile.spare)
        self.targets.subtract_smoothing(gradient, tile)
        if tile.apart:
            row, column, logits = tile.apart
            places = row + tile.rows.start, column + tile.columns.start
            if self.targets.masks_duplicates:
                gradient[row, column] = 0.0
            else:
                probability = self.weights.probabilities_at(logits, *places)
                target = self.targets.of_duplicates(*places)
                gradient[row, column] = (probability - target).to(gradient.dtype)
        own = tile.own_places()
        if own:
            tile.diagonal(gradient).copy_(self.own_gradient[own[0]])
        self.targets.subtract_teacher(gradient, tile)
        return gradient

    def own_coefficients(self, tile: Tile) -> Tensor:
        """G of a tile of this rank's rows, which was observed before."""
        return self.coefficients(tile)
