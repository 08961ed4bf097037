"""Dense reference implementation of the contrastive losses: start reading here.

`dense_loss` computes all N x N logits in one process and leaves the gradients to autograd. The
distributed loss in contrastive_loss.py returns the same values for any number of ranks, without
ever storing that matrix. Its tests compare it with this module.

With I_i and T_j the L2-normalised embeddings of media i and caption j, the logits are

    l_ij = scale * <I_i, T_j> + bias                                              [N, N]

kind="softmax", CLIP (Radford et al. 2021, figure 3; ConVIRT, Zhang et al. 2020, equations 2-4):

    L = 1/2N * sum_i CE(t_i, softmax_j l_ij) + 1/2N * sum_j CE(u_j, softmax_i l_ij)
    CE(t, p) = -sum_k t_k log p_k

The targets t_i of row i, [N], sum to 1. The targets u_j of column j are built in the same way:

    plain             t_ij = 1 if j = i, else 0
    duplicates        pairs that share a key. "positives": all P_i duplicates (i included) get
                      1/P_i. "masked": duplicates other than i are removed from softmax and targets
    label_smoothing   (1 - e) t_ij + e / K_i over the K_i captions in the softmax
                      (Szegedy et al. 2016, section 7)
    teacher           (1 - w) t_ij + w softmax_j(teacher_scale * <I'_i, T'_j>), with I' and T' the
                      teacher's embeddings (Hinton et al. 2015, equation 1)

direction="forward" keeps only the first of the two sums, with the factor 1/N.

negatives="all_pairs" takes a single softmax over all N x N logits, and t_ij that sum to 1 over all
pairs: 1/P for each of the P positives, (1 - e) t_ij + e / K over the K pairs that are not masked.

    L = - sum_ij t_ij log softmax_ij l_ij             at least log P, however good the embeddings

kind="sigmoid", SigLIP (Zhai et al. 2023, equation 1), with y_ij = 1 for positives, else 0:

    L = 1/N * sum_ij [ softplus(l_ij) - y_ij l_ij ]

Masked duplicates are excluded from both sums.

The exact loss distributes this over ranks, here two. Rank a holds the media I_a and captions T_a
of its own pairs, each [B, D]. It computes the row block of its media, tile by tile:

                 T_0      T_1
        I_0  |  l_00  |  l_01  |   row block of rank 0
        I_1  |  l_10  |  l_11  |   row block of rank 1

    pass 1   all-gather      T_a and the logits of own pairs       every rank -> all ranks
             locally         sums of exp(l): complete for the rows of the block, partial for its
                             columns
             all-reduce      partial column sums [N], loss and recall of the rows
                             -> all ranks know the log-sum-exps c_j, the loss and the recalls
    pass 2   locally         the tiles again, and from them G_ij = 2N dL/dl_ij
                             = exp(l_ij - r_i) + exp(l_ij - c_j) - t_ij - u_ij,
                             where r_i and c_j are the log-sum-exps of row i and column j
                             -> dL/dI_a = scale / 2N * (G_a0 T_0 + G_a1 T_1)
             reduce-scatter  G_ab^T I_a, summed over a             every rank -> rank b
                             -> dL/dT_b = scale / 2N * (G_0b^T I_0 + G_1b^T I_1)

This is mode "strip1". In mode "strip2", pass 1 also gathers the media, and the all-reduce includes
[N] row sums. Each rank then also computes the column block of its captions, and pass 2 sends
nothing. The sigmoid loss needs no log-sum-exps: it does all of this in one pass,
with G_ij = N dL/dl_ij = sigmoid(l_ij) - y_ij.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from pretrain.loss.options import Direction, Duplicates, Kind, Negatives, Teacher

TIE_TOLERANCE = 1e-12  # float64 similarities that differ by less are equal up to rounding


def dense_loss(
    media: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    kind: Kind = "softmax",
    duplicates: Duplicates = "negatives",
    label_smoothing: float = 0.0,
    keys: Sequence[Tensor] = (),
    teacher: Teacher | None = None,
    direction: Direction = "both",
    negatives: Negatives = "per_anchor",
) -> Tensor:
    """Computes the loss of the global batch from all of its logits at once.

    Args:
        media: [N, D], L2-normalised.
        text: [N, D], L2-normalised; row i describes row i of media.
        scale: scalar or [1], inverse temperature.
        bias: scalar or [1], for the sigmoid loss only.
        keys: int64 [N] each; pairs that share a key are duplicates.

    Returns:
        Scalar with an autograd graph.
    """
    is_own = torch.eye(len(media), dtype=torch.bool, device=media.device)
    is_duplicate = _share_a_key(keys, like=is_own) & ~is_own  # [N, N]
    is_masked = is_duplicate & (duplicates == "masked")
    is_positive = is_own | is_duplicate & (duplicates == "positives")
    logits = scale * media @ text.T  # [N, N]
    if kind == "sigmoid":
        logits = logits if bias is None else logits + bias
        losses = functional.binary_cross_entropy_with_logits(
            logits, is_positive.to(logits.dtype), reduction="none"
        )
        return losses[~is_masked].sum() / len(media)
    matrices = [logits, is_positive, is_masked]
    if negatives == "all_pairs":  # one row that holds all pairs
        rows = (matrix.reshape(1, -1) for matrix in matrices)
        return _cross_entropy(*rows, label_smoothing=label_smoothing, teacher_weight=None)
    if teacher is not None:
        matrices.append(teacher.scale * teacher.media @ teacher.text.T)
    weight = None if teacher is None else teacher.weight
    settings = {"label_smoothing": label_smoothing, "teacher_weight": weight}
    media_to_text = _cross_entropy(*matrices, **settings)
    if direction == "forward":
        return media_to_text
    text_to_media = _cross_entropy(*(matrix.T for matrix in matrices), **settings)
    return (media_to_text + text_to_media) / 2


def _cross_entropy(
    logits: Tensor,
    is_positive: Tensor,
    is_masked: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    label_smoothing: float,
    teacher_weight: float | None,
) -> Tensor:
    """Computes the mean cross-entropy over the rows of [N, N] logits."""
    positive, compared = (matrix.to(logits.dtype) for matrix in (is_positive, ~is_masked))
    targets = (1 - label_smoothing) * positive / positive.sum(dim=1, keepdim=True)
    targets = targets + label_smoothing * compared / compared.sum(dim=1, keepdim=True)
    if teacher_logits is not None:
        of_teacher = teacher_logits.masked_fill(is_masked, -torch.inf).softmax(dim=1)
        targets = (1 - teacher_weight) * targets + teacher_weight * of_teacher
    log_probabilities = logits.masked_fill(is_masked, -torch.inf).log_softmax(dim=1)
    return -(targets * log_probabilities.masked_fill(is_masked, 0.0)).sum(dim=1).mean()


def _share_a_key(keys: Sequence[Tensor], *, like: Tensor) -> Tensor:
    """Returns bool [N, N]: whether two pairs share a key."""
    matches = [key[:, None] == key for key in keys]
    return torch.stack(matches).any(dim=0) if matches else torch.zeros_like(like)


def dense_recall(
    media: Tensor,
    text: Tensor,
    *,
    duplicates: Duplicates = "negatives",
    keys: Sequence[Tensor] = (),
) -> tuple[float, float]:
    """Computes in-batch recall at 1 in both directions by comparing all pairs.

    A row counts 1 if its own counterpart is the nearest, and 1 / k if k counterparts tie.
    Duplicates that are not negatives do not compete.

    Args:
        media: [N, D], L2-normalised.
        text: [N, D], L2-normalised; row i describes row i of media.
        keys: int64 [N] each; pairs that share a key are duplicates.

    Returns:
        (media to text, text to media), each in [0, 1].
    """
    similarities = media @ text.T  # [N, N]
    is_own = torch.eye(len(media), dtype=torch.bool, device=media.device)
    competes = is_own | ~_share_a_key(keys, like=is_own) | (duplicates == "negatives")
    recalls = []
    for values, competing in ((similarities, competes), (similarities.T, competes.T)):
        own = values.diagonal()[:, None]  # [N, 1]
        is_beaten = ((values > own + TIE_TOLERANCE) & competing).any(dim=1)
        num_tied = (((values - own).abs() <= TIE_TOLERANCE) & competing).sum(dim=1)
        recalls.append((~is_beaten / num_tied.double()).mean().item())
    return tuple(recalls)
