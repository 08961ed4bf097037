"""Sums of exponentials of rows and columns of the N x N logits, from tiles, and softmaxes by them.

Logits of unit vectors lie in [-s, s] with s the scale. Sums are kept in float64 as
sum exp(l - shift), where all of them fit for s up to 340: they add up over tiles and ranks without
a maximum. Inside a float32 tile one exponential serves rows and columns alike while exp(s) fits;
beyond, each direction subtracts its own maximum first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.loss.gpu_compiler import compiled_on_gpu

# Largest |logit| whose exponential, its inverse, and sums of millions of them fit the type well.
PLAIN_EXPONENT = {torch.float32: 40.0, torch.float64: 300.0}
LOWEST = -1e30  # in place of the maximum of a row without entries


def spare_memory(*memory: Tensor) -> list[Tensor | None]:
    """Where intermediate results may be written; a fused kernel writes none."""
    return [None if tensor.is_cuda else tensor for tensor in memory]


@compiled_on_gpu
def sums_of_exponentials(
    logits: Tensor, values: Tensor | None, spare: Tensor | None, *, is_plain: bool
) -> list[tuple[Tensor, Tensor | None, Tensor | None]]:
    """(sums of exp(l - largest), the same weighted by values, largest) of rows, then of columns.

    Args:
        spare: of the logits' shape, to be overwritten; null: new memory is taken.
        is_plain: nothing is subtracted, and there is no largest.
    """
    found = []
    exponentials = torch.exp(logits, out=spare) if is_plain else None
    for dim in (1, 0):
        largest = None
        if not is_plain:
            largest = logits.amax(dim=dim, keepdim=True).clamp(min=LOWEST)
            exponentials = torch.sub(logits, largest, out=spare).exp_()
            largest = largest.squeeze(dim)
        of_values = None if values is None else (exponentials * values).sum(dim=dim)
        found.append((exponentials.sum(dim=dim), of_values, largest))
    return found


@compiled_on_gpu
def sum_of_probabilities(
    logits: Tensor,
    row: Tensor,
    column: Tensor,
    spare: Tensor | None,
    out: Tensor | None,
    *,
    is_plain: bool,
) -> Tensor:
    """exp(l - r) + exp(l - c): [rows, columns].

    Args:
        row: [rows, 1] exp(-r) if `is_plain`, else r.
        column: [columns], alike.
        spare: of the logits' shape, or they themselves, to be overwritten; null: new memory.
        out: another such tensor, for the result.
    """
    if is_plain:
        return torch.add(row, column, out=out).mul_(torch.exp(logits, out=spare))
    of_row = torch.sub(logits, row, out=out).exp_()
    return of_row.add_(torch.sub(logits, column, out=spare).exp_())


@dataclass(frozen=True)
class SoftmaxWeights:
    """exp(l - r) + exp(l - c) for any part of the matrix."""

    row_log_sums: Tensor  # [N], in the type of the tiles
    column_log_sums: Tensor
    is_plain: bool  # the log-sum-exps are given as exp(-r), exp(-c)

    def probabilities(self, logits: Tensor, rows: slice, columns: slice, out: Tensor) -> Tensor:
        """[rows, columns]; the logits and `out` may be overwritten."""
        row, column = self.row_log_sums[rows, None], self.column_log_sums[columns]
        memory = spare_memory(logits, out)
        return sum_of_probabilities(logits, row, column, *memory, is_plain=self.is_plain)

    def probabilities_at(self, logits: Tensor, row: Tensor, column: Tensor) -> Tensor:
        """[places] at single places of the matrix."""
        row, column = self.row_log_sums[row], self.column_log_sums[column]
        if self.is_plain:
            return logits.exp() * (row + column)
        return (logits - row).exp() + (logits - column).exp()


class SoftmaxSums:
    """sum_j exp(l_ij - shift) of rows and sum_i of columns, plain or weighted by further values."""

    def __init__(self, like: Tensor, *, largest_logit: float, has_values: bool = False) -> None:
        """
        Args:
            like: [N] in the type of the tiles.
            has_values: sums of exp(l_ij - shift) * value_ij are kept as well.
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
        spare: Tensor,
        values: Tensor | None = None,
    ) -> None:
        """Adds a tile: [rows, columns], minus infinity where nothing counts; kept as it is.

        Args:
            spare: [rows, columns] to be overwritten.
            values: [rows, columns], finite.
        """
        sides = (
            (rows, self.rows, self.value_rows),
            (columns, self.columns, self.value_columns),
        )
        found = sums_of_exponentials(logits, values, *spare_memory(spare), is_plain=self.is_plain)
        for (places, sums, value_sums), (total, of_values, largest) in zip(
            sides, found, strict=True
        ):
            factor = 1.0 if self.is_plain else (largest.double() - self.shift).exp()
            sums[places] += total * factor
            if values is not None:
                value_sums[places] += of_values * factor

    def add_places(self, logits: Tensor, row: Tensor, column: Tensor) -> None:
        """Adds single places of the matrix: logits, row and column, each [places]."""
        exponentials = (logits.double() - self.shift).exp()
        self.rows.index_add_(0, row, exponentials)
        self.columns.index_add_(0, column, exponentials)

    def to_merge(self, *, for_all_rows: bool) -> list[Tensor]:
        """Vectors [N] of which every rank holds a part; rows are complete on the rank they are of.

        Args:
            for_all_rows: rows of other ranks are needed too.
        """
        names = ["columns", *(["rows"] if for_all_rows else [])]
        if self.value_columns is not None:
            names.append("value_columns")
        self.merged_names = names
        return [getattr(self, name) for name in names]

    def take_merged(self, sums: Sequence[Tensor]) -> None:
        """Replaces what `to_merge` gave by its sums over ranks."""
        for name, value in zip(self.merged_names, sums, strict=True):
            setattr(self, name, value)

    def log_of_rows(self) -> Tensor:
        """float64 [N] log-sum-exps of the rows."""
        return self.rows.log() + self.shift

    def log_of_columns(self) -> Tensor:
        """float64 [N] log-sum-exps of the columns."""
        return self.columns.log() + self.shift

    def weights(self, row_log_sums: Tensor, column_log_sums: Tensor) -> SoftmaxWeights:
        """What turns logits into probabilities under these float64 [N] log-sum-exps."""
        if self.is_plain:
            row_log_sums, column_log_sums = (-row_log_sums).exp(), (-column_log_sums).exp()
        return SoftmaxWeights(
            row_log_sums.to(self.dtype), column_log_sums.to(self.dtype), self.is_plain
        )
