"""In-batch recall at 1, computed from the logit tiles of the loss.

A media or caption is a hit if its own counterpart is the nearest in the global batch. A hit counts
1, or 1 / k if k counterparts tie. Similarities that differ only by rounding count as ties.
The result therefore depends neither on the shape of a matrix product nor on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.loss.gpu_compiler import compiled_on_gpu

# Different summation orders may differ by this many machine epsilons of the largest logit.
ROUNDING_STEPS = 16


class InBatchRecall:
    """Running state for N media and N captions: whether each is beaten, and its number of ties."""

    def __init__(self, positives: Tensor, *, largest_logit: float) -> None:
        """
        Args:
            positives: [N] logits of the own pairs; entries may be set until their row or column is
                observed.
            largest_logit: upper bound of the logits' magnitude.
        """
        self.positives = positives
        self.tolerance = ROUNDING_STEPS * torch.finfo(positives.dtype).eps * largest_logit
        # Row 0 holds the media, row 1 the captions.
        self.is_beaten = torch.zeros(2, len(positives), dtype=torch.bool, device=positives.device)
        self.num_ties = torch.zeros(2, len(positives), dtype=torch.int32, device=positives.device)

    def observe(self, logits: Tensor, *, rows: slice, columns: slice) -> None:
        """Compares the logits of a tile with the own pairs of its rows and columns.

        Args:
            logits: [rows, columns], minus infinity for pairs that do not compete.
        """
        if logits.is_cuda:
            self._observe_both(logits, (rows, columns))
        else:
            self._observe_side(0, rows, logits)
            self._observe_side(1, columns, logits.T)

    def _observe_side(self, side: int, indices: slice, logits: Tensor) -> None:
        """Counts ties only in rows that may have some."""
        own = self.positives[indices]
        largest = nearest(logits)
        self.is_beaten[side, indices] |= largest > own + self.tolerance
        may_tie = (largest >= own - self.tolerance) & ~self.is_beaten[side, indices]
        tied = may_tie.nonzero().squeeze(1)
        if len(tied):
            ties = num_as_near(logits[tied], own[tied] - self.tolerance)
            self.num_ties[side, indices.start + tied] += ties

    def _observe_both(self, logits: Tensor, indices: tuple[slice, slice]) -> None:
        """Counts ties in all rows and columns, because selecting rows would wait for the GPU."""
        own = [self.positives[of_side] for of_side in indices]
        found = nearness(logits, *(values - self.tolerance for values in own))
        for side, (largest, ties) in enumerate(found):
            self.is_beaten[side, indices[side]] |= largest > own[side] + self.tolerance
            self.num_ties[side, indices[side]] += ties

    def media_hits(self, own: slice) -> Tensor:
        """Sums the hits of this rank's media after all tiles; float64 scalar."""
        return hit_fraction(self.is_beaten[0, own], self.num_ties[0, own]).sum()

    def packed_text_codes(self, num_ranks: int) -> Tensor:
        """Returns numbers for `text_hits`, to be summed over ranks; float64 [N / 2] or [N].

        The code of a caption is its number of ties, plus N + 1 if it is beaten. Two codes are
        packed into one float64 if their sums stay below 2^53.
        """
        codes = self.num_ties[1].double() + self.is_beaten[1] * float(self._base)
        if not self._is_packed(num_ranks):
            return codes
        codes = torch.cat([codes, codes.new_zeros(len(codes) % 2)]).view(2, -1)
        return codes[0] + codes[1] * self._packing_base(num_ranks)

    def text_hits(self, packed: Tensor, num_ranks: int) -> Tensor:
        """Sums the hits of all N captions; float64 scalar.

        Args:
            packed: [N / 2] or [N] `packed_text_codes`, summed over ranks.
        """
        if self._is_packed(num_ranks):
            low = packed % self._packing_base(num_ranks)
            packed = torch.cat([low, (packed - low) / self._packing_base(num_ranks)])
        codes = packed[: len(self.positives)]
        return hit_fraction(codes >= self._base, codes).sum()

    @property
    def _base(self) -> int:
        return len(self.positives) + 1

    def _packing_base(self, num_ranks: int) -> int:
        return self._base * (num_ranks + 1)  # larger than any sum of codes over ranks

    def _is_packed(self, num_ranks: int) -> bool:
        return num_packed_codes(len(self.positives), num_ranks) < len(self.positives)


def num_packed_codes(num_pairs: int, num_ranks: int) -> int:
    """Returns the length of `packed_text_codes`: N / 2 unless the batch is huge."""
    fit = ((num_pairs + 1) * (num_ranks + 1)) ** 2 < 2**53
    return -(-num_pairs // 2) if fit else num_pairs


def nearest(logits: Tensor) -> Tensor:
    """Returns the largest logit of each row, [rows]."""
    return logits.amax(dim=1)


def num_as_near(logits: Tensor, least: Tensor) -> Tensor:
    """Counts the logits of each row that are at least `least`; int32 [rows].

    Args:
        logits: [rows, columns].
        least: [rows].
    """
    return (logits >= least[:, None]).sum(dim=1, dtype=torch.int32)


@compiled_on_gpu
def nearness(
    logits: Tensor, row_least: Tensor, column_least: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Returns `nearest` and `num_as_near` of the rows, then of the columns.

    Args:
        logits: [rows, columns].
        row_least: [rows].
        column_least: [columns].
    """
    sides = (logits, row_least), (logits.T, column_least)
    return [(nearest(values), num_as_near(values, least)) for values, least in sides]


def hit_fraction(is_beaten: Tensor, num_ties: Tensor) -> Tensor:
    """Computes 0 if beaten, else 1 / (1 + number of ties), elementwise in float64."""
    return torch.where(is_beaten, 0.0, 1.0 / (1.0 + num_ties.double()))
