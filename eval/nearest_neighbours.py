"""Classification by the votes of the nearest training items, as DINO measures features (Caron et
al. 2021, after Wu et al. 2018): a vote weighs exp(cosine / temperature)."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from eval.ranking import check_finite, cosine_scores

ROWS_AT_ONCE = 1024


def neighbour_votes(
    media_embeddings: Tensor,
    train_embeddings: Tensor,
    train_targets: Tensor,
    *,
    num_classes: int,
    num_neighbours: int,
    temperature: float,
) -> Iterator[Tensor]:
    """The votes for each class, tile by tile: float32 [rows, K].

    Of training items that are equally near, those of the lowest place vote.

    Args:
        media_embeddings: [Q, D], L2-normalised.
        train_embeddings: [n, D], L2-normalised.
        train_targets: int64 [n] from 0 to K - 1.
        num_classes: K.
        num_neighbours: above n it counts as n.
        temperature: of the votes.

    Raises:
        ValueError: an embedding is not finite.
    """
    check_finite(media_embeddings, name="media_embeddings")
    check_finite(train_embeddings, name="train_embeddings")
    num_neighbours = min(num_neighbours, len(train_embeddings))
    for rows in media_embeddings.split(ROWS_AT_ONCE):
        scores = cosine_scores(rows, train_embeddings)  # [rows, n]
        # A stable sort, as topk takes any of equal ones.
        nearest, places = scores.sort(dim=-1, descending=True, stable=True)
        weights = (nearest[:, :num_neighbours].double() / temperature).exp()
        votes = weights.new_zeros(len(rows), num_classes)
        votes.scatter_add_(-1, train_targets[places[:, :num_neighbours]], weights)
        yield votes.float()
