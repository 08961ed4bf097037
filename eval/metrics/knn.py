"""k-nearest-neighbour classification as in DINO (Caron et al. 2021, after Wu et al. 2018).

The nearest training items vote for their classes, each with weight exp(cosine / temperature).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from eval.metrics.ranking import check_finite, cosine_scores

SCORES_AT_ONCE = 1 << 26


def neighbour_votes(
    media_embeddings: Tensor,
    train_embeddings: Tensor,
    train_targets: Tensor,
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
) -> Iterator[Tensor]:
    """Yields the votes for each class, tile by tile: float32 [rows, K].

    Training items tied for the last place split the remaining votes evenly, so that the order of
    training items does not matter.

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
        weights = (nearest.double() / temperature).exp()
        votes = weights.new_zeros(len(rows), num_classes)
        votes.scatter_add_(-1, train_targets[indices], weights)
        last = nearest[:, -1:]
        is_tied = scores == last
        is_cut = is_tied.sum(dim=-1) > (nearest == last).sum(dim=-1)
        for row in is_cut.nonzero().flatten().tolist():
            above = scores[row] > last[row]
            fraction = (num_neighbours - above.sum()) / is_tied[row].sum()
            counts = above.double() + fraction * is_tied[row].double()
            weights = counts * (scores[row].double() / temperature).exp()
            votes[row] = votes.new_zeros(num_classes).scatter_add_(-1, train_targets, weights)
        yield votes.float()
