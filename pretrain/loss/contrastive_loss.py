"""The contrastive loss over all pairs of the global batch, exact for any number of ranks.

    1. own features and those of all ranks     two_passes: gathers rows, all at once or in pieces
    2. tiles of this rank's row block          logit_tiles: [rows, columns] of the N x N logits
    3. loss, in-batch recall and gradients     softmax, sigmoid, in_batch_recall
       or 2 and 3 in GPU kernels               feature_tiles, fused, kernels; chosen by backend

The formulas are in reference.py, which computes the same loss from all logits in one process.
Gradients are computed in the forward pass, without an autograd graph over logits or collectives:
the backward pass only scales them. The tensors saved for it are as large as the features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.distributed.collectives import (
    RowGather,
    RowSplit,
    RowStream,
    rows_per_rank,
    world_size,
)
from pretrain.loss.backend import BackendClasses, backend_classes, choose_backend
from pretrain.loss.in_batch_recall import InBatchRecall
from pretrain.loss.logit_tiles import (
    Features,
    PairDuplicates,
    accumulation_type,
    exact_products,
    own_logits,
)
from pretrain.loss.options import LossOptions, Teacher, check_arguments, check_scale
from pretrain.loss.softmax import AllPairsSoftmaxLoss, SoftmaxTargets
from pretrain.loss.two_passes import LossPasses, TiledLoss, choose_mode, choose_piece_rows


@dataclass(frozen=True)
class ContrastiveLoss:
    """Loss and in-batch recall of one stream in one step."""

    for_backward: Tensor  # scalar; its gradients, averaged over ranks, are those of the global loss
    value: float  # loss of the global batch, equal on all ranks
    media_to_text_recall_at_1: float  # fraction of the N media whose own caption is the nearest
    text_to_media_recall_at_1: float
    num_pairs: int  # N


def contrastive_loss(
    media: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    options: LossOptions | None = None,
    keys: Sequence[Tensor] = (),
    teacher: Teacher | None = None,
    counts: Sequence[int] | None = None,
    media_gather: RowGather | None = None,
    feature_type: torch.dtype | None = None,
) -> ContrastiveLoss:
    """Computes the loss of a stream over the global batch, with exact gradients.

    With the logits l_ij = scale * <media_i, text_j> + bias over all N pairs, the loss is

        softmax  -1/2N * sum_i [ (log_softmax_j l_ij)_i + (log_softmax_j l_ji)_i ]
        sigmoid   1/N * sum_ij [ softplus(l_ij) - (1 if i = j else 0) * l_ij ]

    Label smoothing, duplicates and a teacher change the targets; other directions and negatives
    change the softmaxes; see `reference.dense_loss`.
    Every rank must call it. Ranks may hold different numbers of pairs, including none. Without
    gradients (in evaluation) only the first pass is run.

    Args:
        media: [B, D], L2-normalised.
        text: [B, D], L2-normalised; row i describes row i of media.
        scale: scalar or [1], inverse temperature.
        bias: scalar or [1], for the sigmoid loss only.
        options: None for CLIP's softmax loss.
        keys: one or two int64 [B]; pairs with an equal key are duplicates. Ignored if duplicates
            are negatives.
        teacher: teacher whose softmaxes are mixed into the targets; softmax loss only.
        counts: pairs of each rank, if known; otherwise they are gathered first.
        media_gather: result of `begin_gather` for the same media, in the type of the features.
        feature_type: type in which features are exchanged and multiplied; None for their own. The
            gradients have the type of the arguments, and are not rounded to this one.

    Returns:
        The loss and the in-batch recall at 1, equal on all ranks.

    Raises:
        ValueError: if shapes or settings are inconsistent.
    """
    options = options or LossOptions()
    check_arguments(media, text, bias, options, keys, teacher)
    if counts is None:
        counts = rows_per_rank(len(media), media.device)
    split = RowSplit(tuple(counts))
    if split.total == 0:
        return _loss_of_empty_batch([media, text, scale, *([] if bias is None else [bias])])
    numbers = _read_scale_and_bias(scale, bias)
    check_scale(numbers[0], options)
    dtype = feature_type or torch.promote_types(media.dtype, text.dtype)
    inputs = _LossInputs(options, split, tuple(keys), teacher, media_gather, dtype, *numbers)
    value, metrics = _ExactLoss.apply(media, text, scale, bias, inputs, torch.is_grad_enabled())
    return _loss_with_metrics(value, metrics, num_pairs=split.total)


def begin_gather(media: Tensor, *, options: LossOptions, counts: Sequence[int]) -> RowGather | None:
    """Starts gathering the media of all ranks, to overlap with encoding the captions.

    Every rank must call it. Do not use it for losses with a teacher, whose features are gathered
    together with the media.

    Args:
        media: [B, D], the tensor that `contrastive_loss` will receive.
        counts: pairs of each rank.

    Returns:
        The started gather. None with a single rank, or if the media of all ranks are too large to
        be gathered at once.
    """
    split = RowSplit(tuple(counts))
    piece_rows = options.piece_rows or choose_piece_rows(
        split, width=media.shape[1], device_type=media.device.type
    )
    if world_size() == 1 or piece_rows < max(counts) or split.total == 0:
        return None
    return RowGather([media], split, range(max(counts)))


# --------------------------------------------------------------------- the autograd function


@dataclass(frozen=True)
class _LossInputs:
    options: LossOptions
    split: RowSplit
    keys: tuple[Tensor, ...]
    teacher: Teacher | None
    media_gather: RowGather | None
    dtype: torch.dtype  # type of the features
    scale: float
    bias: float

    def passes(self, media: Tensor, text: Tensor) -> LossPasses:
        options, split, teacher = self.options, self.split, self.teacher
        scale, bias = self.scale, self.bias
        positives = media.new_zeros(split.total, dtype=accumulation_type(media))
        positives[split.own] = own_logits(media, text, scale=scale, bias=bias)
        duplicates = self._duplicates()
        backend = choose_backend(
            media.device,
            media.dtype,
            has_duplicates=duplicates is not None,
            label_smoothing=options.label_smoothing,
            has_teacher=teacher is not None,
            is_per_anchor=options.negatives == "per_anchor",
        )
        classes = backend_classes(backend)
        tiles = classes.tiles(
            media,
            scale=scale,
            bias=bias,
            teacher_scale=teacher.scale if teacher else 0.0,
            duplicates=duplicates,
            masks_duplicates=options.duplicates == "masked",
        )
        mode = choose_mode(split, media.device) if options.mode == "auto" else options.mode
        piece_rows = options.piece_rows or choose_piece_rows(
            split, width=media.shape[1], device_type=media.device.type
        )
        sides = [(media, teacher and teacher.media), (text, teacher and teacher.text)]
        if self.media_gather is not None:
            sides.reverse()  # see two_passes
        return LossPasses(
            *(Features(split.own.start, own, of_teacher) for own, of_teacher in sides),
            loss=self._build_loss(classes, positives, duplicates),
            tiles=tiles,
            split=split,
            mode=mode,
            piece_rows=piece_rows,
            media_gather=self.media_gather,
        )

    def _duplicates(self) -> PairDuplicates | None:
        if not self.keys or self.options.duplicates == "negatives":
            return None
        (_, blocks), *_ = RowStream(self.keys, self.split, piece_rows=max(self.split.counts))
        columns = zip(*(block.tensors for block in blocks), strict=True)
        found = PairDuplicates([torch.cat(parts) for parts in columns])  # each [N]
        return found if found.exist else None

    def _build_loss(
        self, classes: BackendClasses, positives: Tensor, duplicates: PairDuplicates | None
    ) -> TiledLoss:
        masks = self.options.duplicates == "masked"
        recall = InBatchRecall(positives, largest_logit=abs(self.scale) + abs(self.bias))
        if self.options.kind == "sigmoid":
            return classes.sigmoid(positives, self.split, recall, masks_duplicates=masks)
        targets = SoftmaxTargets(
            positives,
            label_smoothing=self.options.label_smoothing,
            duplicates=duplicates,
            masks_duplicates=masks,
            teacher_weight=self.teacher.weight if self.teacher else 0.0,
            teacher_scale=self.teacher.scale if self.teacher else 0.0,
            side_weights=self._side_weights(),
            is_per_anchor=self.options.negatives == "per_anchor",
        )
        build = classes.softmax if targets.is_per_anchor else AllPairsSoftmaxLoss
        return build(positives, self.split, recall, targets, scale=self.scale)

    def _side_weights(self) -> tuple[float, float]:
        """1 or 0 for rows and for columns of the logits, which begin_gather swaps."""
        if self.options.direction == "both":
            return 1.0, 1.0
        return (1.0, 0.0) if self.media_gather is None else (0.0, 1.0)


class _ExactLoss(torch.autograd.Function):
    """Computes the loss and its metrics: [3] loss, media hits and caption hits."""

    @staticmethod
    def forward(
        ctx: Any,
        media: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        inputs: _LossInputs,
        is_training: bool,
    ) -> tuple[Tensor, Tensor]:
        rows, columns = (side.to(inputs.dtype).contiguous() for side in (media, text))
        with exact_products(media.device):
            passes = inputs.passes(rows, columns)
            loss = passes.loss
            if is_training and any(ctx.needs_input_grad):
                sums = passes.compute_value_and_gradients()
                media_sum, text_sum = sums.media, sums.text
                if inputs.media_gather is not None:
                    media_sum, text_sum = text_sum, media_sum
                # The engine averages gradients over ranks.
                factor = world_size() * loss.gradient_factor
                scale_sum = loss.scale_sum
                scale_sum = (_dot(media_sum, rows) if scale_sum is None else scale_sum) * factor
                bias_sum = loss.bias_sum * factor if bias is not None else None
                gradients = (
                    media_sum.mul_(factor * inputs.scale).to(media.dtype),
                    text_sum.mul_(factor * inputs.scale).to(text.dtype),
                    scale_sum.to(scale.dtype).reshape(scale.shape),
                    bias_sum if bias is None else bias_sum.to(bias.dtype).reshape(bias.shape),
                )
                ctx.save_for_backward(*gradients)
            else:
                passes.compute_value()
        hits = [loss.media_hits, loss.text_hits]
        if inputs.media_gather is not None:
            hits.reverse()
        metrics = torch.stack([loss.value, *hits])
        ctx.mark_non_differentiable(metrics)
        return loss.value.to(accumulation_type(rows)), metrics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor, grad_metrics: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(
                None if gradient is None else gradient * grad_value.to(gradient.dtype)
                for gradient in ctx.saved_tensors
            ),
            None,
            None,
        )


def _read_scale_and_bias(scale: Tensor, bias: Tensor | None) -> tuple[float, float]:
    """Returns scale and bias (0 if None) as numbers; waits for the GPU."""
    values = [scale, torch.zeros_like(scale) if bias is None else bias]
    scale_number, bias_number = torch.stack(
        [x.detach().double().squeeze() for x in values]
    ).tolist()
    return scale_number, bias_number


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """Returns the float64 inner product of two [B, D]."""
    return (left * right.to(left.dtype)).sum(dim=-1).double().sum()


def _loss_with_metrics(value: Tensor, metrics: Tensor, *, num_pairs: int) -> ContrastiveLoss:
    loss, media_hits, text_hits = metrics.tolist()
    return ContrastiveLoss(value, loss, media_hits / num_pairs, text_hits / num_pairs, num_pairs)


def _loss_of_empty_batch(inputs: Sequence[Tensor]) -> ContrastiveLoss:
    """Returns a loss of 0 with zero gradients for all inputs."""
    zero = sum((values.float().sum() * 0.0 for values in inputs[1:]), inputs[0].float().sum() * 0.0)
    return ContrastiveLoss(zero, 0.0, 0.0, 0.0, num_pairs=0)
