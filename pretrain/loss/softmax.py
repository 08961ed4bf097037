"""CLIP's loss from logit tiles (Radford et al. 2021, figure 3), in two passes.

The logits are l_ij = scale * <I_i, T_j>. Row i has the log-sum-exp r_i and the targets t_ij, which
sum to 1 over j. Column j has the log-sum-exp c_j and the targets u_ij, which sum to 1 over i. Then

    L = 1/2N * [ sum_i (r_i - sum_j t_ij l_ij)  +  sum_j (c_j - sum_i u_ij l_ij) ]
    G_ij = 2N dL/dl_ij = exp(l_ij - r_i) + exp(l_ij - c_j) - t_ij - u_ij

The first pass sums exponentials of rows and columns from the same tiles. Row sums
are complete on their rank; column sums are completed by one sum over ranks. The second pass
recomputes the tiles, and computes G from them.

The logits p_i = l_ii of own pairs are excluded from the sums, which avoids cancellation when the
match is nearly perfect. Let n_i be the log-sum-exp of row i without its own pair:

    r_i - p_i = softplus(n_i - p_i)        probability of the own caption = 1 - sigmoid(n_i - p_i)

and likewise for columns. Targets (see reference.py) are the sum of three parts:

    own pairs         (1 - w) (1 - e), split evenly among duplicates that are positives
    label smoothing   (1 - w) e / K for each of the K pairs that are not masked
    teacher           w times the teacher's softmax of the row or column

With direction="forward" only the rows count: L = 1/N * sum_i (...), G_ij = exp(l_ij - r_i) - t_ij.

With negatives="all_pairs" there is one softmax over all N x N logits. Z is their log-sum-exp, and
the targets t_ij sum to N over all pairs:

    L = Z - 1/N * sum_ij t_ij l_ij          G_ij = 2N dL/dl_ij = 2 (N exp(l_ij - Z) - t_ij)

These are the formulas above with u_ij = t_ij. In L, r_i = c_j = Z; in G, r_i = c_j = Z - log N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.distributed.collectives import RowSplit, sum_over_ranks
from pretrain.loss.in_batch_recall import InBatchRecall
from pretrain.loss.logit_tiles import PairDuplicates, Tile
from pretrain.loss.sigmoid import softplus
from pretrain.loss.softmax_sums import SoftmaxSums


class TiledSoftmaxLoss:
    """Softmax loss computed from logit tiles: running sums, then gradient coefficients."""

    needs_all_tiles_first = True
    scale_sum = None  # computed from the gradient of the media

    def __init__(
        self,
        positives: Tensor,
        split: RowSplit,
        recall: InBatchRecall,
        targets: SoftmaxTargets,
        *,
        scale: float,
    ) -> None:
        """
        Args:
            positives: [N] logits of the own pairs; this rank's are set, and those of other ranks
                are set as their rows arrive.
        """
        self.positives, self.split, self.recall, self.targets = positives, split, recall, targets
        self.row_weight, self.column_weight = targets.side_weights
        self.gradient_factor = 1 / (sum(targets.side_weights) * split.total)  # dL/dl = factor * G
        self.sums = SoftmaxSums(positives, largest_logit=abs(scale))

    def observe(self, tile: Tile) -> None:
        """Adds a tile of this rank's rows to the sums of rows and columns."""
        self.recall.observe(tile.logits, rows=tile.rows, columns=tile.columns)
        self.targets.observe(tile, self.positives)
        self.sums.add(tile.logits, tile.rows, tile.columns, scratch=tile.scratch)
        if tile.excluded and not self.targets.masks_duplicates:
            row, column, logits = tile.excluded
            self.sums.add_entries(logits, row + tile.rows.start, column + tile.columns.start)

    def merge(self, *, for_all_rows: bool) -> None:
        """Sums over ranks after all tiles have been observed; every rank must call it.

        Sets `value`, `media_hits` and `text_hits`.

        Args:
            for_all_rows: whether coefficients of other ranks' rows are needed too.
        """
        own, num_ranks = self.split.own, len(self.split.counts)
        positives = self.positives.double()
        target_gap = self.targets.own_gap(positives, own)
        scalars = [self._row_sum(positives, own), target_gap, self.recall.media_hits(own)]
        scalars = torch.stack(scalars)
        partial = self.sums.partial_sums(for_all_rows=for_all_rows)
        teacher_sums = self.targets.partial_sums(for_all_rows=for_all_rows)
        parts = [scalars, self.recall.packed_text_codes(num_ranks), *partial, *teacher_sums]
        merged = sum_over_ranks(torch.cat(parts)).split([len(part) for part in parts])
        scalars, codes = merged[:2]
        self.sums.set_merged_sums(merged[2 : 2 + len(partial)])
        self.targets.set_merged_sums(merged[2 + len(partial) :])
        self.text_hits = self.recall.text_hits(codes, num_ranks)
        self.media_hits = scalars[2]
        excess = self._set_gradients(positives, scalars[0])
        gap = scalars[1] + self.targets.column_gap(positives)
        self.value = (excess + gap) * self.gradient_factor

    def _row_sum(self, positives: Tensor, own: slice) -> Tensor:
        """Returns what is summed over the rows of all ranks, float64 scalar: r_i - p_i."""
        return softplus(self.sums.log_of_rows()[own] - positives[own]).sum()

    def _set_gradients(self, positives: Tensor, row_sum: Tensor) -> Tensor:
        """Prepares G; returns sum_i (r_i - p_i) + sum_j (c_j - p_j), as far as directions count.

        Args:
            positives: float64 [N].
            row_sum: sum over ranks of `_row_sum`.
        """
        others_of_rows = self.sums.log_of_rows() - positives  # n_i - p_i
        others_of_columns = self.sums.log_of_columns() - positives
        others = self.row_weight * torch.sigmoid(others_of_rows)
        others += self.column_weight * torch.sigmoid(others_of_columns)
        self.own_gradient = self.targets.own_target_gap() - others  # G_ii without a teacher
        self.weights = self.sums.weights(
            _counted(positives + softplus(others_of_rows), self.row_weight),  # r_i
            _counted(positives + softplus(others_of_columns), self.column_weight),  # c_j
        )
        return self.row_weight * row_sum + self.column_weight * softplus(others_of_columns).sum()

    def coefficients(self, tile: Tile) -> Tensor:
        """Returns G of a tile, [rows, columns]; the tile is overwritten."""
        gradient = self.weights.probabilities(tile.logits, tile.rows, tile.columns, tile.scratch)
        self.targets.subtract_smoothing(gradient, tile)
        if tile.excluded:
            row, column, logits = tile.excluded
            indices = row + tile.rows.start, column + tile.columns.start
            if self.targets.masks_duplicates:
                gradient[row, column] = 0.0
            else:
                probability = self.weights.probabilities_at(logits, *indices)
                target = self.targets.duplicate_targets(*indices)
                gradient[row, column] = (probability - target).to(gradient.dtype)
        own = tile.own_pairs()
        if own:
            tile.diagonal(gradient).copy_(self.own_gradient[own[0]])
        self.targets.subtract_teacher(gradient, tile)
        return gradient

    def own_coefficients(self, tile: Tile) -> Tensor:
        """Returns G of a tile of this rank's rows, [rows, columns]."""
        return self.coefficients(tile)


class AllPairsSoftmaxLoss(TiledSoftmaxLoss):
    """One softmax over the logits of all pairs, computed from logit tiles."""

    def _row_sum(self, positives: Tensor, own: slice) -> Tensor:
        """Returns sum_j exp(l_ij - shift) over this rank's rows, float64 scalar."""
        return self.sums.rows[own].sum() + (positives[own] - self.sums.shift).exp().sum()

    def _set_gradients(self, positives: Tensor, row_sum: Tensor) -> Tensor:
        log_sum = row_sum.log() + self.sums.shift  # Z
        log_mean = log_sum - math.log(self.split.total)
        self.own_gradient = 2 * (positives - log_mean).exp() - self.targets.own_targets()
        log_means = log_mean.expand(self.split.total)
        self.weights = self.sums.weights(log_means, log_means)
        return 2 * (log_sum - positives).sum()


def _counted(log_sums: Tensor, weight: float) -> Tensor:
    """Returns the log-sum-exps of a direction, or infinity (probability 0) if it does not count."""
    return log_sums if weight else torch.full_like(log_sums, torch.inf)


class SoftmaxTargets:
    """Target probabilities, and the gap between own logits and expected target logits.

    With p_i the logit of the own pair i,

        gap = sum_i (p_i - sum_j t_ij l_ij) + sum_j (p_j - sum_i u_ij l_ij)
        L = 1/2N * [ sum_i (r_i - p_i) + sum_j (c_j - p_j) + gap ]
    """

    def __init__(
        self,
        positives: Tensor,
        *,
        label_smoothing: float,
        duplicates: PairDuplicates | None,
        masks_duplicates: bool,
        teacher_weight: float,
        teacher_scale: float,
        side_weights: tuple[float, float] = (1.0, 1.0),
        is_per_anchor: bool = True,
    ) -> None:
        """
        Args:
            positives: [N] logits of the own pairs.
            side_weights: 1 or 0 for rows and for columns: whether their softmaxes count.
            is_per_anchor: whether targets sum to 1 in every row and column; otherwise they sum to
                N over all pairs.
        """
        self.side_weights, self.is_per_anchor = side_weights, is_per_anchor
        self.masks_duplicates, self.teacher_weight = masks_duplicates, teacher_weight
        self.has_duplicates = duplicates is not None
        self.is_smooth = label_smoothing > 0 and teacher_weight < 1
        ones = torch.ones(len(positives), dtype=torch.float64, device=positives.device)
        num_alike = duplicates.num_alike.double() if duplicates else ones
        self.num_positives = ones if masks_duplicates else num_alike
        # K: number of pairs in the row or column that are not masked
        self.num_compared = len(positives) - (num_alike - 1 if masks_duplicates else 0 * ones)
        hard_weight = 1 - teacher_weight
        # [N] target of each positive, and of each pair that is not masked, in a row or column
        num_positives, num_compared = (
            count if is_per_anchor else count.mean().expand_as(count)
            for count in (self.num_positives, self.num_compared)
        )
        self.positive_targets = hard_weight * (1 - label_smoothing) / num_positives
        self.smoothing_targets = hard_weight * label_smoothing / num_compared
        self.gap = ones.new_zeros(())
        self.teacher = None
        if teacher_weight:
            self.teacher = SoftmaxSums(positives, largest_logit=abs(teacher_scale), has_values=True)

    @property
    def are_one_hot(self) -> bool:
        """Whether the target of every own pair is 1 and all other targets are 0."""
        return not (self.is_smooth or self.has_duplicates or self.teacher)

    def observe(self, tile: Tile, positives: Tensor) -> None:
        """Adds a tile of this rank's rows to the gap."""
        if tile.excluded and not self.masks_duplicates:
            row, column, logits = tile.excluded
            sides = (row + tile.rows.start, column + tile.columns.start)
            for weight, indices in zip(self.side_weights, sides, strict=True):
                gap = (positives[indices] - logits).double()
                self.gap += weight * (self.positive_targets[indices] * gap).sum()
        if not self.is_smooth and self.teacher is None:
            return
        logits = self._finite_logits(tile, positives)
        if self.is_smooth:
            sides = ((1, tile.rows), (0, tile.columns))
            for weight, (dim, indices) in zip(self.side_weights, sides, strict=True):
                sums = logits.sum(dim=dim).double()
                self.gap -= weight * (self.smoothing_targets[indices] @ sums)
        if self.teacher is not None:
            scratch = torch.empty_like(logits)
            self.teacher.add(
                tile.teacher_logits, tile.rows, tile.columns, scratch=scratch, values=logits
            )

    def _finite_logits(self, tile: Tile, positives: Tensor) -> Tensor:
        """[rows, columns] in the tile's scratch memory: all logits, with 0 for masked pairs."""
        logits = tile.scratch.copy_(tile.logits)
        if tile.excluded:
            row, column, values = tile.excluded
            logits[row, column] = 0.0 if self.masks_duplicates else values
        own = tile.own_pairs()
        if own:
            tile.diagonal(logits).copy_(positives[own[0]])
        return logits

    def own_gap(self, positives: Tensor, own: slice) -> Tensor:
        """Returns this rank's part of the gap without the teacher's columns, float64 scalar."""
        per_pair = self.smoothing_targets[own] * self.num_compared[own] * positives[own]
        gap = self.gap + sum(self.side_weights) * per_pair.sum()
        if not self.is_per_anchor:  # p_i has the weight 1 in L, whatever the targets of its row
            of_row = self.positive_targets * self.num_positives
            of_row = of_row + self.smoothing_targets * self.num_compared
            gap = gap + sum(self.side_weights) * ((1 - of_row[own]) * positives[own]).sum()
        if self.teacher is not None:
            expected = self.teacher.value_rows[own] / self.teacher.rows[own]
            weight = self.side_weights[0] * self.teacher_weight
            gap = gap + weight * (positives[own] - expected).sum()
        return gap

    def partial_sums(self, *, for_all_rows: bool) -> list[Tensor]:
        """Returns the teacher's [N] sums that must be summed over ranks."""
        return self.teacher.partial_sums(for_all_rows=for_all_rows) if self.teacher else []

    def set_merged_sums(self, sums: Sequence[Tensor]) -> None:
        """Stores the sums over ranks of the result of `partial_sums`."""
        if self.teacher is not None:
            self.teacher.set_merged_sums(sums)
            self.weights = self.teacher.weights(
                _counted(self.teacher.log_of_rows(), self.side_weights[0]),
                _counted(self.teacher.log_of_columns(), self.side_weights[1]),
            )

    def column_gap(self, positives: Tensor) -> Tensor | float:
        """Returns the gap of the teacher's columns after merging, float64 scalar."""
        if self.teacher is None:
            return 0.0
        expected = self.teacher.value_columns / self.teacher.columns
        return self.side_weights[1] * self.teacher_weight * (positives - expected).sum()

    def own_target_gap(self) -> Tensor:
        """Returns 2 - t_ii - u_ii without the teacher's part, float64 [N]; 1 - t_ii if forward."""
        num_sides = sum(self.side_weights)
        return num_sides * (1 - self.positive_targets - self.smoothing_targets)

    def own_targets(self) -> Tensor:
        """Returns t_ii + u_ii without the teacher's part, float64 [N]."""
        return sum(self.side_weights) * (self.positive_targets + self.smoothing_targets)

    def duplicate_targets(self, row: Tensor, column: Tensor) -> Tensor:
        """Returns t_ij + u_ij of duplicates that are positives, without the teacher's part.

        Args:
            row: [duplicates] indices among the N media.
            column: [duplicates] indices among the N captions.
        """
        targets = self.positive_targets + self.smoothing_targets
        row_weight, column_weight = self.side_weights
        return row_weight * targets[row] + column_weight * targets[column]

    def subtract_smoothing(self, gradient: Tensor, tile: Tile) -> None:
        """Subtracts the smoothing targets from G, before excluded entries are written."""
        if self.is_smooth:
            targets = self.smoothing_targets.to(gradient.dtype)
            row_weight, column_weight = self.side_weights
            gradient.sub_(row_weight * targets[tile.rows, None])
            gradient.sub_(column_weight * targets[tile.columns])

    def subtract_teacher(self, gradient: Tensor, tile: Tile) -> None:
        """Subtracts the teacher's probabilities from G; the tile's logits are overwritten."""
        if self.teacher is not None:
            probabilities = self.weights.probabilities(
                tile.teacher_logits, tile.rows, tile.columns, tile.logits
            )
            gradient.sub_(probabilities, alpha=self.teacher_weight)
