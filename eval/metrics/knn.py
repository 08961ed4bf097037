"""k-nearest-neighbour classification as in DINO (Caron et al. 2021, after Wu et al. 2018).

The nearest training items vote for their classes, each with weight exp(cosine / temperature). Sums
of weights are kept as logarithms, so that no temperature overflows or underflows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from eval.metrics.ranking import check_finite, cosine_scores

SCORES_AT_ONCE = 1 << 26
ROUNDING = 1 << 24
LOWEST_EXPONENT = -1e300  # times ROUNDING, it is finite


def neighbour_votes(
    media_embeddings: Tensor,
    train_embeddings: Tensor,
    train_targets: Tensor,
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
) -> Iterator[Tensor]:
    """Yields the logarithm of the votes for each class, tile by tile: float64 [rows, K].

    Votes are divided by the weight of the item's nearest neighbour. A class without votes has the
    lowest float64. Training items tied for the last place split the remaining votes evenly, so that
    the order of training items does not matter.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        train_embeddings: [n, D], L2-normalised.
        train_targets: int64 [n] from 0 to K - 1.
        num_classes: K.
        num_neighbours: number of nearest training items that vote; at most n are used.
        temperature: divisor of the cosine similarity in the weight of a vote.

    Raises:
        ValueError: if an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(train_embeddings, name="train_embeddings")
    num_neighbours = min(num_neighbours, len(train_embeddings))
    for rows in media_embeddings.split(max(1, SCORES_AT_ONCE // len(train_embeddings))):
        scores = cosine_scores(rows, train_embeddings)  # [rows, n]
        nearest, indices = scores.topk(num_neighbours, dim=-1)
        best, last = nearest[:, :1].double(), nearest[:, -1:]
        exponents = (nearest.double() - best) / temperature
        votes = _log_sums(
            exponents, torch.ones_like(exponents), train_targets[indices], num_classes=num_classes
        )
        is_tied = scores == last
        is_cut = is_tied.sum(dim=-1) > (nearest == last).sum(dim=-1)
        for row in is_cut.nonzero().flatten().tolist():
            above = scores[row] > last[row]
            fraction = (num_neighbours - above.sum()) / is_tied[row].sum()
            counts = above.double() + fraction * is_tied[row].double()
            voters = counts.nonzero().flatten()
            votes[row] = _log_sums(
                (scores[row, voters].double() - best[row])[None] / temperature,
                counts[voters][None],
                train_targets[voters][None],
                num_classes=num_classes,
            )[0]
        yield votes


def _log_sums(exponents: Tensor, counts: Tensor, classes: Tensor, *, num_classes: int) -> Tensor:
    """Computes the logarithm of the sum of counts * exp(exponents) of each class: [rows, K].

    Results are rounded to multiples of 2^-24. Sums of the same terms in different orders may differ
    in their last bits, which would break ties.

    Args:
        exponents: float64 [rows, voters]
        counts: float64 [rows, voters], positive.
        classes: int64 [rows, voters] from 0 to K - 1.
        num_classes: K.
    """
    exponents = exponents.clamp(min=LOWEST_EXPONENT)
    lowest = torch.finfo(torch.float64).min
    greatest = exponents.new_full((len(exponents), num_classes), lowest)
    greatest.scatter_reduce_(-1, classes, exponents, "amax")
    terms = counts * (exponents - greatest.gather(-1, classes)).exp()
    sums = torch.zeros_like(greatest).scatter_add_(-1, classes, terms)
    rounded = ((greatest + sums.log()) * ROUNDING).round() / ROUNDING
    return torch.where(sums > 0, rounded, lowest)
