"""What a softmax over captions, or media, should be: own pairs, duplicates, smoothing, a teacher.

The loss of row i is r_i - sum_j t_ij l_ij = (r_i - p_i) + sum_j t_ij (p_i - l_ij). The second sum
is the gap of the row: exactly 0 where the own pair is the only target. Columns alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pretrain.loss.logit_tiles import Tile
from pretrain.loss.pair_duplicates import PairDuplicates
from pretrain.loss.softmax_sums import SoftmaxSums


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
