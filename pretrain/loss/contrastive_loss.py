"""The contrastive loss over all pairs of the global batch, exact for any number of ranks.

    1. every rank compares its rows with those of all ranks     loss_passes, gather
    2. tile by tile of its strip of the logits                  logit_strips
    3. which gives the loss, hits and gradients                 softmax_strips, sigmoid_strips
       or both in kernels of a GPU                              fused_strips, chosen by loss_backend

Gradients are taken inside the forward pass, without a graph over logits or collectives: the
backward pass only multiplies them. What is kept for it is of the size of the features.
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
from pretrain.loss.backend import StripClasses, choose_backend, strip_classes
from pretrain.loss.in_batch_recall import InBatchHits, num_words
from pretrain.loss.logit_tiles import (
    Features,
    PairDuplicates,
    accumulation_type,
    exact_products,
    own_logits,
)
from pretrain.loss.options import LossOptions, Mode, Teacher, refuse_large_scale, refuse_unfit
from pretrain.loss.softmax import SoftmaxTargets
from pretrain.loss.two_passes import LossPasses, Strips

# On a GPU, rows per rank from which fewer products (strip1) are worth more bytes: between what
# 450 GB/s (1.6k) and 50 GB/s (14k) between GPUs would ask for.
STRIP1_ROWS = 4096
GATHERED_BYTES = 256 * 2**20  # what may be held of all ranks' rows before they are streamed
# Of float32, all ranks together, in one piece of a stream. A GPU is kept busy by larger pieces.
PIECE_BYTES = {"cpu": 32 * 2**20, "cuda": 128 * 2**20}


@dataclass(frozen=True)
class ContrastiveLoss:
    """The loss of one pairing in one step."""

    for_backward: Tensor  # scalar; its gradients, averaged over ranks, are those of the global loss
    value: float  # of the global batch, the same on every rank
    media_to_text_recall_at_1: float  # share of the N media whose own caption is the nearest
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
) -> ContrastiveLoss:
    """The loss of a pairing over the global batch, with exact gradients for all that need one.

    Every rank must call it; ranks may hold different numbers of pairs, also none. Without
    gradients (in evaluation) only the first pass is made.

    Args:
        media: [B, D] L2-normalised.
        text: [B, D] L2-normalised; row i describes row i of media.
        scale: scalar or [1], inverse temperature.
        bias: scalar or [1], of the sigmoid loss alone.
        keys: one or two of int64 [B]; pairs with an equal key are duplicates. Without effect where
            duplicates are negatives.
        teacher: adds its softmaxes to the targets of the softmax loss.
        options: null for CLIP's softmax loss.
        counts: pairs of each rank, if known; otherwise ranks tell one another.
        media_gather: from `begin_gather` of the same media, in the same type.

    Raises:
        ValueError: shapes or settings do not fit together.
    """
    options = options or LossOptions()
    refuse_unfit(media, text, bias, options, keys, teacher)
    if counts is None:
        counts = rows_per_rank(len(media), media.device)
    split = RowSplit(tuple(counts))
    if split.total == 0:
        return _loss_of_nothing([media, text, scale, *([] if bias is None else [bias])])
    numbers = _numbers(scale, bias)
    refuse_large_scale(numbers[0], options)
    inputs = _LossInputs(options, split, tuple(keys), teacher, media_gather, *numbers)
    value, figures = _ExactLoss.apply(media, text, scale, bias, inputs, torch.is_grad_enabled())
    return _loss_with_figures(value, figures, num_pairs=split.total)


def begin_gather(media: Tensor, *, options: LossOptions, counts: Sequence[int]) -> RowGather | None:
    """Sends this rank's media to the others while captions are encoded, if they all fit at once.

    Every rank must call it. Without a teacher only: its features travel with the media's.

    Args:
        media: [B, D], as `contrastive_loss` will be given them.
        counts: pairs of each rank.
    """
    split = RowSplit(tuple(counts))
    piece_rows = options.piece_rows or choose_piece_rows(
        split, width=media.shape[1], device_type=media.device.type
    )
    if world_size() == 1 or piece_rows < max(counts) or split.total == 0:
        return None
    return RowGather([media], split, range(max(counts)))


def choose_mode(split: RowSplit, device: torch.device) -> Mode:
    """The faster mode: on CPUs always the one with fewer products."""
    rows = split.total / len(split.counts)
    is_bound_by_products = device.type == "cpu" or len(split.counts) == 1 or rows >= STRIP1_ROWS
    return "strip1" if is_bound_by_products else "strip2"


def choose_piece_rows(split: RowSplit, *, width: int, device_type: str = "cpu") -> int:
    """Rows of each rank that travel at once: all, unless they would fill too much memory."""
    num_ranks, most = len(split.counts), max(split.counts)
    # Captions, and their gradients or media, in float32 at most.
    if num_ranks == 1 or 2 * 4 * num_ranks * most * width <= GATHERED_BYTES:
        return most
    return max(1, min(most, PIECE_BYTES[device_type] // (4 * num_ranks * width)))


def received_bytes(
    counts: Sequence[int],
    *,
    options: LossOptions,
    width: int,
    feature_bytes: int,
    device: torch.device,
) -> int:
    """What a rank receives from the others for the loss and its gradients, but for the padding of
    messages.

    Args:
        counts: pairs of each rank.
        width: D.
        feature_bytes: of one number of a feature.
    """
    split = RowSplit(tuple(counts))
    num_ranks, num_rows = len(counts), len(counts) * max(counts)
    mode = choose_mode(split, device) if options.mode == "auto" else options.mode
    piece_rows = options.piece_rows or choose_piece_rows(
        split, width=width, device_type=device.type
    )
    captions = num_rows * (width * feature_bytes + 4)  # with the logits of own pairs
    # The softmax's first pass is followed by a second, for which pieces travel again.
    gathered = captions * (2 if options.kind == "softmax" and piece_rows < max(counts) else 1)
    gathered += num_rows * width * (4 if mode == "strip1" else feature_bytes)  # sums, or media
    if options.duplicates != "negatives":
        gathered += num_rows * 2 * 8  # keys
    num_sums = num_words(split.total, num_ranks)
    if options.kind == "softmax":
        num_sums += split.total * (1 if mode == "strip1" else 2)
    return round((gathered + 2 * 8 * num_sums) * (num_ranks - 1) / num_ranks)


# --------------------------------------------------------------------------------- the function


@dataclass(frozen=True)
class _LossInputs:
    options: LossOptions
    split: RowSplit
    keys: tuple[Tensor, ...]
    teacher: Teacher | None
    media_gather: RowGather | None
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
        )
        classes = strip_classes(backend)
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
            sides.reverse()  # see loss_passes
        return LossPasses(
            *(Features(split.own.start, own, of_teacher) for own, of_teacher in sides),
            strips=self._strips(classes, positives, duplicates),
            tiles=tiles,
            split=split,
            mode=mode,
            piece_rows=piece_rows,
            begun=self.media_gather,
        )

    def _duplicates(self) -> PairDuplicates | None:
        if not self.keys or self.options.duplicates == "negatives":
            return None
        (_, blocks), *_ = RowStream(self.keys, self.split, piece_rows=max(self.split.counts))
        columns = zip(*(block.tensors for block in blocks), strict=True)
        found = PairDuplicates([torch.cat(parts) for parts in columns])  # each [N]
        return found if found.exist else None

    def _strips(
        self, classes: StripClasses, positives: Tensor, duplicates: PairDuplicates | None
    ) -> Strips:
        masks = self.options.duplicates == "masked"
        hits = InBatchHits(positives, largest_logit=abs(self.scale) + abs(self.bias))
        if self.options.kind == "sigmoid":
            return classes.sigmoid(positives, self.split, hits, masks_duplicates=masks)
        targets = SoftmaxTargets(
            positives,
            label_smoothing=self.options.label_smoothing,
            duplicates=duplicates,
            masks_duplicates=masks,
            teacher_weight=self.teacher.weight if self.teacher else 0.0,
            teacher_scale=self.teacher.scale if self.teacher else 0.0,
        )
        return classes.softmax(positives, self.split, hits, targets, scale=self.scale)


class _ExactLoss(torch.autograd.Function):
    """(loss, figures [3]: loss, hits of media, hits of captions); the figures have no gradient."""

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
        dtype = torch.promote_types(media.dtype, text.dtype)
        rows, columns = (side.to(dtype).contiguous() for side in (media, text))
        with exact_products(media.device):
            passes = inputs.passes(rows, columns)
            strips = passes.strips
            if is_training and any(ctx.needs_input_grad):
                sums = passes.take_value_and_gradients()
                of_media, of_text = sums.media, sums.text
                if inputs.media_gather is not None:
                    of_media, of_text = of_text, of_media
                # The engine takes the mean over ranks of what each returns.
                factor = world_size() * strips.gradient_factor
                scale_sum = strips.scale_sum
                of_scale = (_dot(of_media, rows) if scale_sum is None else scale_sum) * factor
                of_bias = strips.bias_sum * factor if bias is not None else None
                gradients = (
                    of_media.mul_(factor * inputs.scale).to(media.dtype),
                    of_text.mul_(factor * inputs.scale).to(text.dtype),
                    of_scale.to(scale.dtype).reshape(scale.shape),
                    of_bias if bias is None else of_bias.to(bias.dtype).reshape(bias.shape),
                )
                ctx.save_for_backward(*gradients)
            else:
                passes.take_value()
        hits = [strips.media_hits, strips.text_hits]
        if inputs.media_gather is not None:
            hits.reverse()
        figures = torch.stack([strips.value, *hits])
        ctx.mark_non_differentiable(figures)
        return strips.value.to(accumulation_type(rows)), figures

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_value: Tensor, of_figures: Tensor) -> tuple[Tensor | None, ...]:
        return (
            *(
                None if gradient is None else gradient * of_value.to(gradient.dtype)
                for gradient in ctx.saved_tensors
            ),
            None,
            None,
        )


def _numbers(scale: Tensor, bias: Tensor | None) -> tuple[float, float]:
    """Scale and bias (0 without one): waits for the GPU, as reading the loss does."""
    values = [scale, torch.zeros_like(scale) if bias is None else bias]
    scale_number, bias_number = torch.stack(
        [x.detach().double().squeeze() for x in values]
    ).tolist()
    return scale_number, bias_number


def _dot(left: Tensor, right: Tensor) -> Tensor:
    """float64 sum of all products of two [B, D]."""
    return (left * right.to(left.dtype)).sum(dim=-1).double().sum()


def _loss_with_figures(value: Tensor, figures: Tensor, *, num_pairs: int) -> ContrastiveLoss:
    loss, media_hits, text_hits = figures.tolist()
    return ContrastiveLoss(value, loss, media_hits / num_pairs, text_hits / num_pairs, num_pairs)


def _loss_of_nothing(inputs: Sequence[Tensor]) -> ContrastiveLoss:
    """Of a step that takes no pair: 0, with gradients of 0 for all."""
    zero = sum((values.float().sum() * 0.0 for values in inputs[1:]), inputs[0].float().sum() * 0.0)
    return ContrastiveLoss(zero, 0.0, 0.0, 0.0, num_pairs=0)
