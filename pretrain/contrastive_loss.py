"""The contrastive loss over all pairs of the global batch, exact for any number of ranks.

Each rank holds B of the N pairs. It compares its own rows with all gathered features,

    L = 1 / (2N) * sum_i [ CE(s I_i T^T, i) + CE(s T_i I^T, i) ]

(Radford et al. 2021, figure 3), and the ranks' parts add up to L.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.gather import gather_rows, rank, rows_per_rank, sum_over_ranks, world_size


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss of one pairing in one step."""

    for_backward: Tensor  # scalar; its gradients, averaged over ranks, are those of the global loss
    value: float  # of the global batch, the same on every rank
    media_to_text_recall_at_1: float  # share of the N media whose own caption is the nearest
    text_to_media_recall_at_1: float
    num_pairs: int  # N


def softmax_loss(media: Tensor, text: Tensor, scale: Tensor) -> ContrastiveLoss:
    """CLIP's symmetric cross entropy over the global batch.

    Every rank must call it; ranks may hold different numbers of pairs, also none.

    Args:
        media: [B, D] L2-normalised.
        text: [B, D] L2-normalised; row i describes row i of media.
        scale: [1] inverse temperature, above 0.
    """
    media, text = media.float(), text.float()
    counts = rows_per_rank(len(media), media.device)
    num_pairs = sum(counts)
    all_media = gather_rows(media, counts=counts)  # [B, D] -> [N, D]
    all_text = gather_rows(text, counts=counts)  # [B, D] -> [N, D]
    own = torch.arange(len(media), device=media.device) + sum(counts[: rank()])  # [B]

    media_logits = scale * media @ all_text.T  # [B, N]
    text_logits = scale * text @ all_media.T  # [B, N]
    losses = functional.cross_entropy(media_logits, own, reduction="sum")
    losses = losses + functional.cross_entropy(text_logits, own, reduction="sum")
    share_of_loss = losses / (2 * num_pairs)

    with torch.no_grad():
        media_hits = hit_share(media_logits, own).sum()
        text_hits = hit_share(text_logits, own).sum()
        sums = torch.stack([share_of_loss, media_hits, text_hits])
        value, media_hits, text_hits = sum_over_ranks(sums.double()).tolist()
    return ContrastiveLoss(
        for_backward=share_of_loss * world_size(),  # the engine takes the mean over ranks
        value=value,
        media_to_text_recall_at_1=media_hits / num_pairs,
        text_to_media_recall_at_1=text_hits / num_pairs,
        num_pairs=num_pairs,
    )


def hit_share(logits: Tensor, own: Tensor) -> Tensor:
    """[B] 1 where the own column is the largest, 0 where another is, 1 / k where k columns tie.

    Args:
        logits: [B, N].
        own: [B] integers, the column that belongs to each row.
    """
    positives = logits.gather(1, own[:, None])  # [B, 1]
    is_beaten = (logits > positives).any(dim=-1)  # [B]
    num_equal = (logits == positives).sum(dim=-1)  # [B], the own column counted
    return torch.where(is_beaten, 0.0, 1.0 / num_equal)
