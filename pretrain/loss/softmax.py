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

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.distributed.collectives import RowSplit, sum_over_ranks
from pretrain.loss.in_batch_recall import InBatchHits
from pretrain.loss.logit_tiles import PairDuplicates, Tile
from pretrain.loss.sigmoid import softplus
from pretrain.loss.softmax_sums import SoftmaxSums


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


class SoftmaxTargets:
    """Target probabilities, and the gaps of both directions."""

    def __init__(
        self,
        positives: Tensor,
        *,
        label_smoothing: float,
        duplicates: PairDuplicates | None,
        masks_duplicates: bool,
        teacher_weight: float,
        teacher_scale: float,
    ) -> None:
        """
        Args:
            positives: [N] logits of the own pairs.
        """
        self.masks_duplicates, self.teacher_weight = masks_duplicates, teacher_weight
        self.has_duplicates = duplicates is not None
        self.is_smooth = label_smoothing > 0 and teacher_weight < 1
        ones = torch.ones(len(positives), dtype=torch.float64, device=positives.device)
        num_alike = duplicates.num_alike.double() if duplicates else ones
        num_positives = ones if masks_duplicates else num_alike
        # K: pairs that are not masked in the row or column
        self.num_compared = len(positives) - (num_alike - 1 if masks_duplicates else 0 * ones)
        hard = 1 - teacher_weight
        self.of_positive = hard * (1 - label_smoothing) / num_positives  # [N]
        self.of_every_pair = hard * label_smoothing / self.num_compared  # [N]
        self.gap = ones.new_zeros(())
        self.teacher = None
        if teacher_weight:
            self.teacher = SoftmaxSums(positives, largest_logit=abs(teacher_scale), has_values=True)

    @property
    def are_own_pairs_alone(self) -> bool:
        """Whether every target is 1 at the own pair and 0 at all others."""
        return not (self.is_smooth or self.has_duplicates or self.teacher)

    def observe(self, tile: Tile, positives: Tensor) -> None:
        """Adds a tile of this rank's rows to the gaps of rows and columns."""
        if tile.apart and not self.masks_duplicates:
            row, column, logits = tile.apart
            for place in (row + tile.rows.start, column + tile.columns.start):
                gap = (positives[place] - logits).double()
                self.gap += (self.of_positive[place] * gap).sum()
        if not self.is_smooth and self.teacher is None:
            return
        logits = self._finite_logits(tile, positives)
        if self.is_smooth:
            for dim, places in ((1, tile.rows), (0, tile.columns)):
                self.gap -= self.of_every_pair[places] @ logits.sum(dim=dim).double()
        if self.teacher is not None:
            spare = torch.empty_like(logits)
            self.teacher.add(
                tile.teacher_logits, tile.rows, tile.columns, spare=spare, values=logits
            )

    def _finite_logits(self, tile: Tile, positives: Tensor) -> Tensor:
        """[rows, columns] in the tile's spare memory: all logits, 0 where a pair is masked."""
        logits = tile.spare.copy_(tile.logits)
        if tile.apart:
            row, column, values = tile.apart
            logits[row, column] = 0.0 if self.masks_duplicates else values
        own = tile.own_places()
        if own:
            tile.diagonal(logits).copy_(positives[own[0]])
        return logits

    def own_gap(self, positives: Tensor, own: slice) -> Tensor:
        """float64 scalar: this rank's part of all gaps but those of the teacher's columns."""
        per_pair = self.of_every_pair[own] * self.num_compared[own] * positives[own]
        gap = self.gap + 2 * per_pair.sum()
        if self.teacher is not None:
            expected = self.teacher.value_rows[own] / self.teacher.rows[own]
            gap = gap + self.teacher_weight * (positives[own] - expected).sum()
        return gap

    def to_merge(self, *, for_all_rows: bool) -> list[Tensor]:
        """The teacher's sums [N] of which every rank holds a part."""
        return self.teacher.to_merge(for_all_rows=for_all_rows) if self.teacher else []

    def take_merged(self, sums: Sequence[Tensor]) -> None:
        """Replaces what `to_merge` gave by its sums over ranks."""
        if self.teacher is not None:
            self.teacher.take_merged(sums)
            self.weights = self.teacher.weights(
                self.teacher.log_of_rows(), self.teacher.log_of_columns()
            )

    def gap_of_columns(self, positives: Tensor) -> Tensor | float:
        """float64 scalar: the gaps of the teacher's columns, once merged."""
        if self.teacher is None:
            return 0.0
        expected = self.teacher.value_columns / self.teacher.columns
        return self.teacher_weight * (positives - expected).sum()

    def gap_of_own_place(self) -> Tensor:
        """float64 [N] 2 - t_ii - u_ii without the teacher's part."""
        return 2 * (1 - self.of_positive - self.of_every_pair)

    def of_duplicates(self, row: Tensor, column: Tensor) -> Tensor:
        """float64 [places] t_ij + u_ij of duplicates that are positives, without the teacher's."""
        weights = self.of_positive + self.of_every_pair
        return weights[row] + weights[column]

    def subtract_smoothing(self, gradient: Tensor, tile: Tile) -> None:
        """Takes every pair's share off a tile of G, before the places set apart are written."""
        if self.is_smooth:
            share = self.of_every_pair.to(gradient.dtype)
            gradient.sub_(share[tile.rows, None]).sub_(share[tile.columns])

    def subtract_teacher(self, gradient: Tensor, tile: Tile) -> None:
        """Takes the teacher's probabilities off a tile of G; the tile's logits are overwritten."""
        if self.teacher is not None:
            probabilities = self.weights.probabilities(
                tile.teacher_logits, tile.rows, tile.columns, tile.logits
            )
            gradient.sub_(probabilities, alpha=self.teacher_weight)
