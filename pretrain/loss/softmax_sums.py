"""Sums of exponentials of rows and columns of the N x N logits, and softmaxes computed from them.

Logits of unit vectors lie in [-s, s], where s is the scale. Sums are stored in float64 as
sum exp(l - shift), which cannot overflow for s up to 340. They add up over tiles and ranks without
a running maximum. Within a float32 tile, one exponential serves both rows and columns while exp(s)
fits. For larger scales, each direction subtracts its own maximum first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.loss.gpu_compiler import compiled_on_gpu

# Largest |logit| for which exp(l), exp(-l) and sums of millions of them fit the dtype.
PLAIN_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}
LOWEST = -1e30  # stands in for the maximum of a row without entries


def scratch_unless_fused(*memory: Tensor) -> list[Tensor | None]:
    """Returns the scratch tensors, or None for each on a GPU, where kernels are fused."""
    return [None if tensor.is_cuda else tensor for tensor in memory]


@compiled_on_gpu
def sums_of_exponentials(
    logits: Tensor, values: Tensor | None, scratch: Tensor | None, *, is_plain: bool
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """Sums exp(l - largest) over rows, then over columns.

    Args:
        logits: [rows, columns].
        values: [rows, columns] weights of a second sum, or None.
        scratch: [rows, columns] to overwrite; None allocates memory.
        is_plain: whether nothing is subtracted.

    Returns:
        For rows and for columns: the sums, the sums weighted by values or None, and the largest
        logits, or None if `is_plain`.
    """
    found = []
    exponentials = torch.exp(logits, out=scratch) if is_plain else None
    for dim in (1, 0):
        largest = None
        if not is_plain:
            largest = logits.amax(dim=dim, keepdim=True).clamp(min=LOWEST)
            exponentials = torch.sub(logits, largest, out=scratch).exp_()
            largest = largest.squeeze(dim)
        of_values = None if values is None else (exponentials * values).sum(dim=dim)
        found.append((exponentials.sum(dim=dim), of_values, largest))
    return found


@compiled_on_gpu
def sum_of_probabilities(
    logits: Tensor,
    row: Tensor,
    column: Tensor,
    scratch: Tensor | None,
    out: Tensor | None,
    *,
    is_plain: bool,
) -> Tensor:
    """Computes exp(l - r) + exp(l - c), [rows, columns].

    Args:
        logits: [rows, columns].
        row: [rows, 1], exp(-r) if `is_plain`, else r.
        column: [columns], exp(-c) if `is_plain`, else c.
        scratch: [rows, columns] to overwrite, possibly the logits; None allocates memory.
        out: [rows, columns] for the result; None allocates memory.
    """
    if is_plain:
        return torch.add(row, column, out=out).mul_(torch.exp(logits, out=scratch))
    of_row = torch.sub(logits, row, out=out).exp_()
    return of_row.add_(torch.sub(logits, column, out=scratch).exp_())


@dataclass(frozen=True)
class SoftmaxWeights:
    """Computes exp(l - r) + exp(l - c) for any part of the N x N matrix."""

    row_log_sums: Tensor  # [N] r, in the dtype of the tiles
    column_log_sums: Tensor  # [N] c
    is_plain: bool  # whether log-sum-exps are stored as exp(-r) and exp(-c)

    def probabilities(self, logits: Tensor, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """Returns [rows, columns] for a tile; the logits and `out` may be overwritten."""
        row, column = self.row_log_sums[rows, None], self.column_log_sums[columns]
        memory = scratch_unless_fused(logits, out)
        return sum_of_probabilities(logits, row, column, *memory, is_plain=self.is_plain)

    def probabilities_at(self, logits: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """Returns [entries] for single entries of the matrix.

        Args:
            logits: [entries].
            row: [entries] indices among the N rows.
            column: [entries] indices among the N columns.
        """
        row, column = self.row_log_sums[row], self.column_log_sums[column]
        if self.is_plain:
            return logits.exp() * (row + column)
        return (logits - row).exp() + (logits - column).exp()


class SoftmaxSums:
    """Running sums sum_j exp(l_ij - shift) of rows and sum_i exp(l_ij - shift) of columns.

    Optionally also the same sums with a weight per entry.
    """

    def __init__(self, like: Tensor, *, largest_logit: float, has_values: bool = False) -> None:
        """
        Args:
            like: [N] in the dtype of the tiles.
            has_values: whether to also sum exp(l_ij - shift) * value_ij.
        """
        self.dtype = like.dtype
        self.is_plain = largest_logit <= PLAIN_EXPONENT[like.dtype]
        self.shift = 0.0 if self.is_plain else largest_logit
        zeros = torch.zeros(len(like), dtype=torch.float64, device=like.device)
        self.rows, self.columns = zeros, zeros.clone()
        self.value_rows = zeros.clone() if has_values else None
        self.value_columns = zeros.clone() if has_values else None

    def add(
        self,
        logits: Tensor,
        rows: slice,
        columns: slice,
        *,
        scratch: Tensor,
        values: Tensor | None = None,
    ) -> None:
        """Adds a tile to the sums, without modifying it.

        Args:
            logits: [rows, columns], minus infinity for entries that do not count.
            scratch: [rows, columns] to overwrite.
            values: [rows, columns], finite.
        """
        sides = (
            (rows, self.rows, self.value_rows),
            (columns, self.columns, self.value_columns),
        )
        found = sums_of_exponentials(
            logits, values, *scratch_unless_fused(scratch), is_plain=self.is_plain
        )
        for (indices, sums, value_sums), (total, of_values, largest) in zip(
            sides, found, strict=True
        ):
            factor = 1.0 if self.is_plain else (largest.double() - self.shift).exp()
            sums[indices] += total * factor
            if values is not None:
                value_sums[indices] += of_values * factor

    def add_entries(self, logits: Tensor, row: Tensor, column: Tensor) -> None:
        """Adds single entries of the matrix to the sums.

        Args:
            logits: [entries].
            row: [entries] indices among the N rows.
            column: [entries] indices among the N columns.
        """
        exponentials = (logits.double() - self.shift).exp()
        self.rows.index_add_(0, row, exponentials)
        self.columns.index_add_(0, column, exponentials)

    def partial_sums(self, *, for_all_rows: bool) -> list[Tensor]:
        """Returns the [N] sums that must be summed over ranks.

        A rank's own rows are complete; the sums of its columns are not.

        Args:
            for_all_rows: whether sums of other ranks' rows are needed too.
        """
        names = ["columns", *(["rows"] if for_all_rows else [])]
        if self.value_columns is not None:
            names.append("value_columns")
        self.merged_names = names
        return [getattr(self, name) for name in names]

    def set_merged_sums(self, sums: Sequence[Tensor]) -> None:
        """Stores the sums over ranks of the result of `partial_sums`."""
        for name, value in zip(self.merged_names, sums, strict=True):
            setattr(self, name, value)

    def log_of_rows(self) -> Tensor:
        """Returns the log-sum-exps of the rows, float64 [N]."""
        return self.rows.log() + self.shift

    def log_of_columns(self) -> Tensor:
        """Returns the log-sum-exps of the columns, float64 [N]."""
        return self.columns.log() + self.shift

    def weights(self, row_log_sums: Tensor, column_log_sums: Tensor) -> SoftmaxWeights:
        """Builds the map from logits to probabilities for float64 [N] log-sum-exps."""
        if self.is_plain:
            row_log_sums, column_log_sums = (-row_log_sums).exp(), (-column_log_sums).exp()
        return SoftmaxWeights(
            row_log_sums.to(self.dtype), column_log_sums.to(self.dtype), self.is_plain
        )
