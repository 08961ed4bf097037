"""The contrastive losses written the obvious way: all N x N logits, plain autograd, one process."""

import torch
from torch.nn import functional


def dense_loss(
    media,
    text,
    scale,
    bias=None,
    *,
    kind="softmax",
    duplicates="negatives",
    label_smoothing=0.0,
    keys=(),
    teacher=None,
):
    """The loss as a scalar with a graph."""
    num_pairs = len(media)
    own = torch.eye(num_pairs, dtype=torch.bool)
    alike = own.clone()
    if duplicates != "negatives":
        for key in keys:
            alike |= key[:, None] == key
    logits = scale * media @ text.T
    if bias is not None:
        logits = logits + bias
    counts = torch.ones_like(logits, dtype=torch.bool)
    if duplicates == "masked":
        counts = own | ~alike
        alike = own
    if kind == "sigmoid":
        losses = functional.binary_cross_entropy_with_logits(
            logits, alike.to(logits.dtype), reduction="none"
        )
        return losses[counts].sum() / num_pairs
    total = 0
    for side in (0, 1):
        direction = [x if side == 0 else x.T for x in (logits, alike, counts)]
        values, positive, counted = direction
        hard, even = (x.double() / x.sum(dim=1, keepdim=True) for x in (positive, counted))
        targets = (1 - label_smoothing) * hard + label_smoothing * even
        if teacher is not None:
            theirs = teacher.scale * teacher.media @ teacher.text.T
            theirs = (theirs if side == 0 else theirs.T).masked_fill(~counted, -torch.inf)
            targets = (1 - teacher.weight) * targets + teacher.weight * theirs.softmax(dim=1)
        log_probabilities = values.masked_fill(~counted, -torch.inf).log_softmax(dim=1)
        total = total - (targets * log_probabilities.masked_fill(~counted, 0)).sum()
    return total / (2 * num_pairs)


def dense_hits(media, text, *, duplicates="negatives", keys=()):
    """(media to text, text to media) recall at 1 with ties shared, by comparing every pair."""
    similarities = media @ text.T
    competes = torch.ones_like(similarities, dtype=torch.bool)
    if duplicates != "negatives":
        for key in keys:
            competes &= key[:, None] != key
    competes |= torch.eye(len(media), dtype=torch.bool)
    shares = []
    for values, counted in ((similarities, competes), (similarities.T, competes.T)):
        own = values.diagonal()[:, None]
        is_beaten = ((values > own + 1e-12) & counted).any(dim=1)
        num_equal = (((values - own).abs() <= 1e-12) & counted).sum(dim=1)
        shares.append((~is_beaten / num_equal.double()).mean().item())
    return tuple(shares)
