"""How often the own counterpart is the nearest in the batch, from the strips that the loss takes.

A hit counts 1, or 1 / k where k counterparts tie for the first place. Similarities that differ by
rounding alone tie, so that neither the shape of a matrix product nor the device decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.loss.gpu_compiler import compiled_on_gpu

ROUNDING_STEPS = 16  # of the logits' largest magnitude: what two ways of summing may differ by


class InBatchHits:
    """What was seen of N media and of N captions: is another nearer, and how many are as near?"""

    def __init__(self, positives: Tensor, *, largest_logit: float) -> None:
        """
        Args:
            positives: [N] logits of the own pairs; an entry is read when its row or column is.
            largest_logit: a bound of their magnitude.
        """
        self.positives = positives
        self.tolerance = ROUNDING_STEPS * torch.finfo(positives.dtype).eps * largest_logit
        self.is_beaten = torch.zeros(2, len(positives), dtype=torch.bool, device=positives.device)
        self.num_ties = torch.zeros(2, len(positives), dtype=torch.int32, device=positives.device)

    def observe(self, logits: Tensor, *, rows: slice, columns: slice) -> None:
        """
        Args:
            logits: [rows, columns], minus infinity where a pair does not compete.
        """
        if logits.is_cuda:
            self._observe_all(logits, (rows, columns))
        else:
            self._observe(0, rows, logits)
            self._observe(1, columns, logits.T)

    def _observe(self, side: int, places: slice, logits: Tensor) -> None:
        """Counts ties only where there may be some."""
        own = self.positives[places]
        largest = nearest(logits)
        self.is_beaten[side, places] |= largest > own + self.tolerance
        may_tie = (largest >= own - self.tolerance) & ~self.is_beaten[side, places]
        tied = may_tie.nonzero().squeeze(1)
        if len(tied):
            ties = num_as_near(logits[tied], own[tied] - self.tolerance)
            self.num_ties[side, places.start + tied] += ties

    def _observe_all(self, logits: Tensor, places: tuple[slice, slice]) -> None:
        """Counts ties everywhere: to ask whether there are some would be to wait for the GPU."""
        own = [self.positives[place] for place in places]
        found = nearness(logits, *(values - self.tolerance for values in own))
        for side, (largest, ties) in enumerate(found):
            self.is_beaten[side, places[side]] |= largest > own[side] + self.tolerance
            self.num_ties[side, places[side]] += ties

    def media_hits(self, own: slice) -> Tensor:
        """float64 sum over this rank's media, which it has compared with all captions."""
        return hit_share(self.is_beaten[0, own], self.num_ties[0, own]).sum()

    def text_words(self, num_ranks: int) -> Tensor:
        """float64 [N / 2 or N] numbers whose sum over ranks is read by `text_hits`.

        A caption's code is its ties plus (N + 1) if it is beaten. Two codes fit into one float64
        while all their sums stay below 2^53.
        """
        codes = self.num_ties[1].double() + self.is_beaten[1] * float(self._base)
        if not self._is_packed(num_ranks):
            return codes
        codes = torch.cat([codes, codes.new_zeros(len(codes) % 2)]).view(2, -1)
        return codes[0] + codes[1] * self._word_base(num_ranks)

    def text_hits(self, words: Tensor, num_ranks: int) -> Tensor:
        """float64 sum over all captions, from the words of all ranks."""
        if self._is_packed(num_ranks):
            low = words % self._word_base(num_ranks)
            words = torch.cat([low, (words - low) / self._word_base(num_ranks)])
        codes = words[: len(self.positives)]
        return hit_share(codes >= self._base, codes).sum()

    @property
    def _base(self) -> int:
        return len(self.positives) + 1

    def _word_base(self, num_ranks: int) -> int:
        return self._base * (num_ranks + 1)  # above any sum of codes

    def _is_packed(self, num_ranks: int) -> bool:
        return num_words(len(self.positives), num_ranks) < len(self.positives)


def num_words(num_pairs: int, num_ranks: int) -> int:
    """How many numbers `text_words` gives: two codes fit into one unless the batch is huge."""
    fit = ((num_pairs + 1) * (num_ranks + 1)) ** 2 < 2**53
    return -(-num_pairs // 2) if fit else num_pairs


def nearest(logits: Tensor) -> Tensor:
    """[rows] the largest of each row."""
    return logits.amax(dim=1)


def num_as_near(logits: Tensor, least: Tensor) -> Tensor:
    """int32 [rows] how many of each row are at least so large."""
    return (logits >= least[:, None]).sum(dim=1, dtype=torch.int32)


@compiled_on_gpu
def nearness(
    logits: Tensor, row_least: Tensor, column_least: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(largest, how many are at least so large) of each row, then of each column."""
    sides = (logits, row_least), (logits.T, column_least)
    return [(nearest(values), num_as_near(values, least)) for values, least in sides]


def hit_share(is_beaten: Tensor, num_ties: Tensor) -> Tensor:
    """float64 [rows] 0 where beaten, else 1 / (1 + others that tie)."""
    return torch.where(is_beaten, 0.0, 1.0 / (1.0 + num_ties.double()))
